"""Many small pictures in one image file, as a page wants them: a grid of tiles, found by column and row."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from analysis.pictures import Picture

LOSSLESS: dict[str, Any] = {"format": "PNG", "optimize": True}
PREVIEW: dict[str, Any] = {"format": "WEBP", "quality": 85, "method": 6}
"""For pictures that nothing is measured on."""
QUICK_PREVIEW = PREVIEW | {"method": 2}
MIME = {"PNG": "image/png", "WEBP": "image/webp"}


def sheet(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """The pictures, all of one size, in rows from the top left."""
    height, width = rows[0][0].shape[:2]
    image = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            image.paste(Image.fromarray(picture), (column * width, row * height))
    return image


def data_url(image: Image.Image, **options: Any) -> str:
    """The image as a `data:` address; `options` are Pillow's of `save`, such as LOSSLESS."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return f"data:{MIME[options['format']]};base64,{base64.b64encode(buffer.getvalue()).decode()}"
