"""Fetch the Fluent 3D pictures and their names with npm and pack them into one file.

    python -m assets.recipe.data --out build/pictures.npz

Pictures: npm `@lobehub/fluent-emoji-3d` (MIT). Names: npm `emoji-datasource-google` (MIT), `emoji.json`.
"""

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emoji-datasource-google@16.0.0"
CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "Travel & Places")
PIXELS = 64


@dataclass(frozen=True)
class Pack:
    """Training set: uint8 pictures (n, 64, 64, 3) or clips (n, frames, 64, 64, 3), and the captions of each, the name first."""

    pictures: np.ndarray
    captions: list[list[str]]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, pictures=self.pictures, captions=np.array(json.dumps(self.captions)))

    @classmethod
    def load(cls, path: Path) -> "Pack":
        with np.load(path, allow_pickle=False) as file:
            return cls(file["pictures"], json.loads(str(file["captions"])))


def words(text: str) -> str:
    """Lower-case words only: 'Cat Face with Tears-of-Joy' becomes 'cat face with tears of joy'."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def captions_of(entry: dict) -> list[str]:
    """The name, then every short name that says something else."""
    return list(dict.fromkeys(filter(None, map(words, [entry["name"], *entry["short_names"]]))))


def is_subject(entry: dict) -> bool:
    """The four chosen categories, without the 24 clock faces, which differ only in the angle of a hand."""
    return entry["category"] in CATEGORIES and not entry["short_name"].startswith("clock")


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack one npm package; returns its folder."""
    archive = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    target = folder / archive.removesuffix(".tgz")
    with tarfile.open(folder / archive) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def on_white(picture: Image.Image) -> np.ndarray:
    """One picture on white, uint8 (64, 64, 3)."""
    image = picture.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))


def pack(pictures_folder: Path, names_folder: Path) -> Pack:
    files = {path.stem.replace("-fe0f", ""): path for path in (pictures_folder / "assets").glob("*.webp")}
    pictures, captions = [], []
    entries = json.loads((names_folder / "emoji.json").read_text())
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="packing"):
        code = entry["unified"].lower().replace("-fe0f", "")
        if is_subject(entry) and code in files and captions_of(entry):
            pictures.append(on_white(Image.open(files[code])))
            captions.append(captions_of(entry))
    return Pack(np.stack(pictures), captions)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pictures.npz"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(fetch(PICTURES, Path(folder)), fetch(NAMES, Path(folder)))
    packed.save(args.out)
    print(f"{len(packed.captions)} pictures, {args.out.stat().st_size / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
