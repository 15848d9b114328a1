"""What a run draws, a picture or a video, and how it is written to a file."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import export_to_gif, export_to_video
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
"""uint8 (height, width, 3)."""
Video = NDArray[np.uint8]
"""uint8 (frames, height, width, 3)."""
FRAMES_PER_SECOND = 8
"""Open-Sora 1.0 draws its 16 frames for two seconds."""


def drawn(output: Any) -> Picture | Video:
    """The first picture or video of a pipeline's output, which was asked for as numbers in [0, 1]."""
    first = output.frames[0] if hasattr(output, "frames") else output.images[0]
    pixels: NDArray[np.uint8] = (np.asarray(first) * 255).round().astype(np.uint8)
    return pixels


def is_video(picture: Picture | Video) -> bool:
    return picture.ndim == 4


def save(picture: Picture | Video, stem: Path) -> list[str]:
    """Write `stem`.png, or for a video `stem`.gif, and `stem`.mp4 where the package imageio-ffmpeg is installed.

    Returns:
        The names of the files.
    """
    if not is_video(picture):
        Image.fromarray(picture).save(stem.with_suffix(".png"))
        return [f"{stem.name}.png"]
    frames = [Image.fromarray(frame) for frame in picture]
    export_to_gif(frames, str(stem.with_suffix(".gif")), fps=FRAMES_PER_SECOND)
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return [f"{stem.name}.gif"]
    export_to_video(frames, str(stem.with_suffix(".mp4")), fps=FRAMES_PER_SECOND, quality=9)
    return [f"{stem.name}.gif", f"{stem.name}.mp4"]
