"""A request as the explorer's page shows it: plain JSON. The atlas stores scenes, and a live run sends them.

    request     prompt, seed, steps, guidance, sampler
    num_blocks  L
    size        width and height of every picture
    machine     what the seconds were measured on
    baseline    picture, previews, seconds
    map         cosine by block and step, null where nothing was compared
    features    by block: previews of its principal components, one a step
    yardsticks  what a difference may be held against: jpeg, seed
    runs        BlockDance: the figures of `experiment.figures`, picture, previews
    controls    the plain sampler with fewer steps: the same, without previews

A picture is `{src, column, row}`, a tile of an image file or a `data:` address; previews are such a row, one tile a step.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.experiment import Request
from analysis.pictures import Picture

Json = dict[str, Any]


def tile(src: str, row: int = 0, column: int = 0) -> Json:
    """Where a picture, or the first of a row of previews, is found."""
    return {"src": src, "column": column, "row": row}


def new_scene(request: Request, num_blocks: int, picture: Picture, machine: str) -> Json:
    """A scene of which only the request is known."""
    height, width = picture.shape[:2]
    empty: Json = {"baseline": None, "map": None, "features": None, "yardsticks": None, "runs": [], "controls": []}
    return {"request": asdict(request), "num_blocks": num_blocks, "size": [width, height], "machine": machine} | empty


def map_part(cosine: NDArray[np.floating]) -> list[list[float | None]]:
    """The similarity map with as many digits as float32 has at 1."""
    return [[None if np.isnan(value) else round(float(value), 7) for value in row] for row in cosine]


def features_part(features: dict[int, NDArray[np.uint8] | None], src: str) -> Json | None:
    """Where the features are, which are the rows of one sheet; None where there are none."""
    if any(pictures is None for pictures in features.values()):
        return None
    side = next(pictures.shape[1] for pictures in features.values() if pictures is not None)
    rows = {str(block): tile(src, row) for row, block in enumerate(features)}
    return {"side": side, "blocks": rows, "names": dict(zip(rows, ("shallow", "middle", "deep"), strict=False))}


def run_part(figures: Json, picture: Json, previews: Json | None = None, **timing: Any) -> Json:
    """One run of a scene; `timing` says how often it was timed, and how much that varied."""
    return figures | {"rounds": 1} | timing | {"picture": picture, "previews": previews}
