"""Some samples of a batch by themselves, and the batch put together again.

A call has one row for each sample, or two with both guidance branches in it, one branch after the other: of k samples,
sample s has the rows s, s + k, and so on. A stream may have several rows for each of those, one after the other, as where
frames are rows.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHARED = re.compile(r"^(img|txt)_ids$|rope|rotary")
"""Names of arguments of transformers that have no rows, though their length might equal their number."""

LATENTS = ("x", "hidden_states")
"""What transformers call their latent."""


def rows_of(samples: Sequence[int], num_samples: int, rows: int) -> list[int]:
    """The rows of these samples, in a call of `rows` rows."""
    return [first + sample for first in range(0, rows, num_samples) for sample in samples]


def arguments_for(values: dict[str, Any], chosen: Tensor, rows: int) -> dict[str, Any]:
    """Arguments of the transformer by name, of which tensors with one row per row of the batch keep the chosen ones.

    Those inside dictionaries, lists and tuples too, such as the residuals of a ControlNet. Where the latent is a list with a
    tensor for each row, as Z-Image takes it, other lists as long are of rows too.
    """
    by_lists = any(isinstance(values.get(name), list) for name in LATENTS)

    def part(name: str, value: Any) -> Any:
        if by_lists and isinstance(value, list) and len(value) == rows:
            return [value[row] for row in chosen.tolist()]
        if isinstance(value, dict):
            return {inner: part(inner, one) for inner, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(part(name, one) for one in value)
        if isinstance(value, Tensor) and not SHARED.search(name) and value.ndim and len(value) == rows:
            return value[chosen.to(value.device)]
        return value

    return {name: part(name, value) for name, value in values.items()}


def together(outputs: Sequence[Any], chosen: Sequence[Tensor]) -> Any:
    """The transformer's output for the whole batch, from its outputs for parts of it."""
    first = outputs[0]
    if isinstance(first, Tensor):
        whole = first.new_empty(sum(map(len, chosen)), *first.shape[1:])
        for output, rows in zip(outputs, chosen, strict=True):
            whole[rows.to(whole.device)] = output
        return whole
    if isinstance(first, list):
        placed = {row: one for output, rows in zip(outputs, chosen, strict=True) for row, one in zip(rows.tolist(), output)}  # noqa: B905
        return [placed[row] for row in sorted(placed)]
    if isinstance(first, tuple):
        return tuple(together(parts, chosen) for parts in zip(*outputs, strict=True))
    return type(first)(sample=together([output.sample for output in outputs], chosen))


def sample_of(stream: Tensor, place: int, num_samples: int, rows: int) -> Tensor:
    """The rows of the sample at this place; the stream itself if it is the only one."""
    return stream if num_samples == 1 else stream.unflatten(0, (rows, -1))[place::num_samples].flatten(0, 1)


def samples_joined(streams: Sequence[Tensor], rows: int) -> Tensor:
    """The inverse of `sample_of`, for all samples of a call of `rows` rows."""
    if len(streams) == 1:
        return streams[0]
    each = rows // len(streams)
    return torch.stack([stream.unflatten(0, (each, -1)) for stream in streams], dim=1).flatten(0, 2)
