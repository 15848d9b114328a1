"""Fetch pictures and their names with npm and pack them into one file.

    python -m assets.recipe.data --out build/pictures.npz
    python -m assets.recipe.data --styles fluent noto twemoji --all-subjects --colour-words --out build/styles.npz

The first is what the model in the box was trained on. Pictures: npm `@lobehub/fluent-emoji-3d` (MIT), `emoji-datasource-google`
(Noto, Apache-2.0), `emoji-datasource-twitter` (Twemoji, CC-BY 4.0). Names: `emoji.json` of `emoji-datasource-google` (MIT).
"""

import argparse
import colorsys
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

STYLES = {
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
}
"""By name the npm package and the folder of its pictures."""
NAMES = "emoji-datasource-google@16.0.0"
CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "Travel & Places")
LEFT_OUT = ("Flags", "Component")
"""Categories that not even all subjects have; variants of skin tone have no entry of their own."""
PIXELS = 64
HUES = {
    20: "red",
    45: "orange",
    70: "yellow",
    165: "green",
    195: "turquoise",
    255: "blue",
    290: "purple",
    340: "pink",
    361: "red",
}
"""Colour words by the hue, in degrees, that they reach up to."""
MOSTLY = 0.6
"""Share of a picture's coloured pixels that one word must fit."""


@dataclass(frozen=True)
class Pack:
    """Training set: uint8 pictures (n, 64, 64, 3) or clips (n, frames, 64, 64, 3), and the captions of each, the name first."""

    pictures: np.ndarray
    captions: list[list[str]]
    styles: list[str] = field(default_factory=list)
    """Of each picture; none where all have the same."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        captions, styles = (np.array(json.dumps(told)) for told in (self.captions, self.styles))
        np.savez_compressed(path, pictures=self.pictures, captions=captions, styles=styles)

    @classmethod
    def load(cls, path: Path) -> "Pack":
        with np.load(path, allow_pickle=False) as file:
            return cls(file["pictures"], json.loads(str(file["captions"])), json.loads(str(file["styles"])))


def words(text: str) -> str:
    """Lower-case words only: 'Cat Face with Tears-of-Joy' becomes 'cat face with tears of joy'."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def captions_of(entry: dict) -> list[str]:
    """The name, then every short name that says something else."""
    return list(dict.fromkeys(filter(None, map(words, [entry["name"], *entry["short_names"]]))))


def is_subject(entry: dict, every: bool = False) -> bool:
    """Of the four chosen categories, or of every but flags; without the clock faces, which differ in the angle of a hand."""
    chosen = entry["category"] not in LEFT_OUT if every else entry["category"] in CATEGORIES
    return chosen and not entry["short_name"].startswith("clock")


def colour_word(picture: np.ndarray) -> str | None:
    """What most of a picture's coloured pixels are called, if one word fits most of them; uint8 (h, w, 3) on white."""
    seen = [colorsys.rgb_to_hsv(*pixel) for pixel in picture[::2, ::2].reshape(-1, 3) / 255]
    hues = [360 * hue for hue, strength, light in seen if strength > 0.35 and light > 0.25]
    named = [next(word for limit, word in HUES.items() if hue < limit) for hue in hues]
    if len(named) < len(seen) // 20:
        return None
    word, count = Counter(named).most_common(1)[0]
    return word if count >= MOSTLY * len(named) else None


def with_colour(captions: list[str], word: str | None) -> list[str]:
    """One caption more, "red" before the shortest name, unless a caption has that word."""
    if word is None or any(word in caption.split() for caption in captions):
        return captions
    return [*captions, f"{word} {min(captions, key=len)}"]


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


def pack(folders: Mapping[str, Path], names_folder: Path, every: bool = False, colour_words: bool = False) -> Pack:
    """The pictures of every subject in every style.

    Args:
        folders: of the pictures, by style.
        names_folder: the unpacked NAMES.
        every: all subjects, and not the four categories alone.
        colour_words: captions that say a picture's colour, where one does.
    """
    pictures, captions, styles = [], [], []
    entries = json.loads((names_folder / "emoji.json").read_text())
    files = {style: {file.stem.replace("-fe0f", ""): file for file in folder.iterdir()} for style, folder in folders.items()}
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="packing"):
        code, names = entry["unified"].lower().replace("-fe0f", ""), captions_of(entry)
        for style in folders if is_subject(entry, every) and names else ():
            if code in files[style]:
                drawn = on_white(Image.open(files[style][code]))
                pictures.append(drawn)
                captions.append(with_colour(names, colour_word(drawn)) if colour_words else names)
                styles.append(style)
    return Pack(np.stack(pictures), captions, styles if len(folders) > 1 else [])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pictures.npz"))
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=["fluent"], help="(default: fluent)")
    parser.add_argument("--all-subjects", action="store_true", help="about 1,650, and not the four categories alone")
    parser.add_argument("--colour-words", action="store_true", help="captions that say the colour, found in the picture")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        names = fetch(NAMES, Path(folder))
        packages = {style: STYLES[style] for style in args.styles}
        folders = {
            style: (names if package == NAMES else fetch(package, Path(folder))) / place
            for style, (package, place) in packages.items()
        }
        packed = pack(folders, names, args.all_subjects, args.colour_words)
    packed.save(args.out)
    print(f"{len(packed.captions)} pictures, {args.out.stat().st_size / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
