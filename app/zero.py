"""ZeroGPU Spaces, where a GPU is lent for the length of a call. Anywhere else nothing here does anything."""

from collections.abc import Callable, Iterator
from typing import Any

from analysis.scene import Json

try:
    import spaces
except ImportError:
    spaces = None

CALL_SECONDS = 60
"""How long a call may hold the GPU; visitors have minutes of it a day."""

Work = Callable[[Json], Iterator[Json]]


def lent_gpu(work: Work) -> Work:
    """Work on orders that is done where the GPU is: on a ZeroGPU Space in another process, so it takes and gives plain JSON."""
    if spaces is None:
        return work
    lent: Any = spaces.GPU(work, duration=CALL_SECONDS)
    return lent  # type: ignore[no-any-return]
