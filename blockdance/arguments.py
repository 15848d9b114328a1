"""The arguments of a call, at any depth: what there is to compare when two calls must be the same."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Leaf = tuple[str, Any]
"""Where a value stands among the arguments, as `added_cond_kwargs.resolution` or `cap_feats.0`, and the value."""


def leaves_of(arguments: Mapping[str, Any]) -> Iterator[Leaf]:
    """Every value that is no container, in order; also those inside dictionaries, lists and tuples."""
    for name, value in arguments.items():
        if isinstance(value, (Mapping, list, tuple)):
            inner = value if isinstance(value, Mapping) else dict(enumerate(value))
            yield f"{name}.", len(inner)
            yield from ((f"{name}.{path}", leaf) for path, leaf in leaves_of({str(key): one for key, one in inner.items()}))
        else:
            yield name, value


def same_value(ours: Any, theirs: Any) -> bool:
    """Whether two leaves are the same: tensors bit for bit (this waits for their device), all else by its own equality."""
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and same_tensor(ours, theirs)
    if ours is theirs:
        return True
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, theirs)
    try:
        return bool(ours == theirs)
    except Exception:  # a foreign type whose equality is no yes or no: not known to be the same
        return False


def same_tensor(ours: Tensor, theirs: Tensor) -> bool:
    """Whether they have the same shape, dtype, device and bits."""
    alike = ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
    return alike and (ours is theirs or torch.equal(ours, theirs))


def version_of(tensor: Tensor) -> int:
    """Counts the writes into a tensor; 0 for those of `torch.inference_mode`, whose writes nobody counts."""
    return 0 if tensor.is_inference() else tensor._version
