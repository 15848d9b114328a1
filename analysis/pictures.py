"""What a run draws, a picture or a video, and how it is written to a file."""

import importlib.util
import io
from collections.abc import Sequence
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

STEP_MILLISECONDS, LAST_MILLISECONDS = 80, 1500


def drawn(output: Any) -> Picture | Video:
    """The first picture or video of a pipeline's output, which was asked for as numbers in [0, 1]."""
    first = output.frames[0] if hasattr(output, "frames") else output.images[0]
    pixels: NDArray[np.uint8] = (np.asarray(first) * 255).round().astype(np.uint8)
    return pixels


def is_video(picture: Picture | Video) -> bool:
    return picture.ndim == 4


def as_jpeg(picture: Picture, quality: int = 90) -> Picture:
    """The picture after it was saved as a JPEG and opened again."""
    return np.asarray(Image.open(io.BytesIO(as_jpeg_bytes(picture, quality))))


def as_jpeg_bytes(picture: Picture, quality: int = 90) -> bytes:
    """The file that the picture makes as a JPEG; the longer, the more there is to see."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def side_by_side_gif(left: Sequence[Picture], right: Sequence[Picture], scale: int = 3) -> bytes:
    """Two runs step by step, as an endless GIF that rests on the last step."""
    frames = [Image.fromarray(np.concatenate(pair, axis=1)) for pair in zip(left, right, strict=True)]
    large = [frame.resize((scale * frame.width, scale * frame.height), Image.Resampling.LANCZOS) for frame in frames]
    buffer = io.BytesIO()
    rests = [STEP_MILLISECONDS] * (len(large) - 1) + [LAST_MILLISECONDS]
    large[0].save(buffer, format="GIF", save_all=True, append_images=large[1:], duration=rests, loop=0)
    return buffer.getvalue()


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
