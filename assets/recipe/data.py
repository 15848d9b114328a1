"""Fetch pictures and their names with npm and pack them into one file.

    python -m assets.recipe.data --out build/pictures.npz
    python -m assets.recipe.data --styles fluent noto twemoji --subjects many --colour-words --keywords --out build/styles.npz

The first is what the model in the box was trained on, the second what the one in three styles was. Pictures: npm
`@lobehub/fluent-emoji-3d` (MIT), `emoji-datasource-google` (Noto, Apache-2.0), `emoji-datasource-twitter` (Twemoji, CC-BY 4.0).
Names: `emoji.json` of `emoji-datasource-google` (MIT). Keywords: `emojilib` (MIT).
"""

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from assets.recipe.colours import PAINTS, captions_in, colour_word, painted, with_colour

STYLES = {
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
}
"""By name the npm package and the folder of its pictures."""
NAMES = "emoji-datasource-google@16.0.0"
STYLES_OPTIONS = ("--styles", *STYLES, "--subjects", "many", "--colour-words", "--keywords")
"""What the model in three styles was trained on."""
KEYWORDS = "emojilib@4.0.3"
MOST_KEYWORDS = 5
"""Of one subject."""
CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "Travel & Places")
LEFT_OUT = {"many": ("Flags", "Component", "Symbols"), "all": ("Flags", "Component")}
"""Categories that many, or even all, subjects lack; variants of skin tone have no entry of their own."""
PEOPLE = re.compile(r"\b(man|men|woman|women|family|couple|facing right)\b", re.IGNORECASE)
"""Names of which many lack: the same person as a man, as a woman, and turned around."""
PIXELS = 64


@dataclass(frozen=True)
class Pack:
    """Training set: uint8 pictures (n, 64, 64, 3) or clips (n, frames, 64, 64, 3), and the captions of each, the name first."""

    pictures: np.ndarray
    captions: list[list[str]]
    styles: list[str] = field(default_factory=list)
    """Of each picture; none where all have the same."""

    def __len__(self) -> int:
        return len(self.captions)

    def __add__(self, other: "Pack") -> "Pack":
        pictures = np.concatenate([self.pictures, other.pictures])
        return Pack(pictures, self.captions + other.captions, self.styles + other.styles)

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


def is_subject(entry: dict, subjects: str = "some") -> bool:
    """Whether an entry is among some (four categories), many (see LEFT_OUT and PEOPLE) or all subjects.

    The clock faces never are, which differ in the angle of a hand.
    """
    category = entry["category"]
    chosen = category in CATEGORIES if subjects == "some" else category not in LEFT_OUT[subjects]
    variant = subjects == "many" and category == "People & Body" and PEOPLE.search(entry["name"])
    return chosen and not variant and not entry["short_name"].startswith("clock")


def keywords_of(folder: Path) -> dict[str, list[str]]:
    """By code, the keywords that are single words of plain letters, the first of each subject; from the unpacked KEYWORDS."""
    told = json.loads((folder / "dist" / "emoji-en-US.json").read_text())
    plain = {code_of(emoji): [word for word in known if re.fullmatch("[a-z]{3,}", word)] for emoji, known in told.items()}
    return {code: known[:MOST_KEYWORDS] for code, known in plain.items()}


def code_of(emoji: str) -> str:
    """Its code points as the files are called: without the one that asks for colour."""
    return "-".join(f"{ord(point):04x}" for point in emoji).replace("-fe0f", "")


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


def pack(
    folders: Mapping[str, Path],
    names_folder: Path,
    subjects: str = "some",
    colour_words: bool = False,
    keywords: Mapping[str, list[str]] | None = None,
) -> Pack:
    """The pictures of every subject in every style.

    Args:
        folders: of the pictures, by style.
        names_folder: the unpacked NAMES.
        subjects: of `is_subject`.
        colour_words: captions that say a picture's colour, where one does.
        keywords: further captions, by code.
    """
    pictures, captions, styles = [], [], []
    entries = json.loads((names_folder / "emoji.json").read_text())
    files = {style: {file.stem.replace("-fe0f", ""): file for file in folder.iterdir()} for style, folder in folders.items()}
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="packing"):
        code, names = entry["unified"].lower().replace("-fe0f", ""), captions_of(entry)
        for style in folders if is_subject(entry, subjects) and names else ():
            if code in files[style]:
                drawn = on_white(Image.open(files[style][code]))
                pictures.append(drawn)
                told = with_colour(names, colour_word(drawn)) if colour_words else names
                captions.append(list(dict.fromkeys([*told, *(keywords or {}).get(code, ())])))
                styles.append(style)
    return Pack(np.stack(pictures), captions, styles if len(folders) > 1 else [])


def painted_pack(pack: Pack) -> Pack:
    """Every picture in every colour of PAINTS, but for those that the contact sheet calls never trained."""
    variants = [(k, word, captions_in(word, group)) for k, group in enumerate(pack.captions) for word in PAINTS]
    kept = [variant for variant in variants if variant[2]]
    pictures = [painted(pack.pictures[k], word) for k, word, _ in tqdm(kept, desc="painting")]
    styles = [pack.styles[k] for k, _, _ in kept] if pack.styles else []
    return Pack(np.stack(pictures), [captions for _, _, captions in kept], styles)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pictures.npz"))
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=["fluent"], help="(default: fluent)")
    parser.add_argument(
        "--subjects", choices=("some", "many", "all"), default="some",
        help="four categories; or all but symbols, flags and the men's and women's variants; or all but flags (default: some)",
    )  # fmt: skip
    parser.add_argument("--colour-words", action="store_true", help="captions that say the colour, found in the picture")
    parser.add_argument("--keywords", action="store_true", help="captions of one keyword, from emojilib")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        names = fetch(NAMES, Path(folder))
        packages = {style: STYLES[style] for style in args.styles}
        folders = {
            style: (names if package == NAMES else fetch(package, Path(folder))) / place
            for style, (package, place) in packages.items()
        }
        keywords = keywords_of(fetch(KEYWORDS, Path(folder))) if args.keywords else None
        packed = pack(folders, names, args.subjects, args.colour_words, keywords)
    packed.save(args.out)
    print(f"{len(packed.captions)} pictures, {args.out.stat().st_size / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
