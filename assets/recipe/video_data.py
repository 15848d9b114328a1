"""Fetch the animated Fluent pictures with npm and pack a few frames of each into one file.

    python -m assets.recipe.video_data --out build/clips.npz

Clips: npm `@lobehub/fluent-emoji-anim-1` to `-4` (MIT). Names: npm `emoji-datasource-google` (MIT), `emoji.json`.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from assets.recipe.data import NAMES, Pack, captions_of, fetch, is_subject, on_white

CLIPS = tuple(f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4))
CATEGORIES = ("Animals & Nature", "Smileys & Emotion")
FRAMES = 8
SUBJECTS = 64
"""What two CPU cores can learn in an hour; there are 262."""
LEAST_MOTION = 1.0
"""Of 255: mean difference between frames that are neighbours. What moves less counts as still."""


def clip(path: Path, frames: int) -> np.ndarray | None:
    """So many frames, evenly over an animation, uint8 (frames, 64, 64, 3); None for a still."""
    image = Image.open(path)
    length = getattr(image, "n_frames", 1)
    if length < frames:
        return None
    pictures = []
    for index in range(frames):
        image.seek(index * length // frames)
        pictures.append(on_white(image))
    return np.stack(pictures)


def motion(frames: np.ndarray) -> float:
    """Mean difference between neighbours, of 255; the last frame is a neighbour of the first."""
    return float(np.abs(frames.astype(np.float32) - np.roll(frames, 1, axis=0)).mean())


def pack(clips_folders: Sequence[Path], names_folder: Path, frames: int, subjects: int) -> Pack:
    """Clips of the chosen categories that move, at most so many, evenly over all: uint8 (n, frames, 64, 64, 3)."""
    files = {path.stem.replace("-fe0f", ""): path for folder in clips_folders for path in (folder / "assets").glob("*.webp")}
    pictures, captions = [], []
    entries = json.loads((names_folder / "emoji.json").read_text())
    for entry in tqdm(sorted(entries, key=lambda entry: entry["sort_order"]), desc="packing"):
        code = entry["unified"].lower().replace("-fe0f", "")
        if entry["category"] not in CATEGORIES or not is_subject(entry) or code not in files:
            continue
        found = clip(files[code], frames)
        if found is not None and motion(found) >= LEAST_MOTION:
            pictures.append(found)
            captions.append(captions_of(entry))
    chosen = np.linspace(0, len(captions) - 1, min(subjects, len(captions))).round().astype(int)
    return Pack(np.stack(pictures)[chosen], [captions[k] for k in chosen])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/clips.npz"))
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--subjects", type=int, default=SUBJECTS, help="at most (default: %(default)s; there are 262)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        folders = [fetch(package, Path(folder)) for package in (NAMES, *CLIPS)]
        packed = pack(folders[1:], folders[0], args.frames, args.subjects)
    packed.save(args.out)
    print(f"{len(packed.captions)} clips, {args.out.stat().st_size / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
