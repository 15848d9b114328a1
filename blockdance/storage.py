"""What a reuse step starts from, made of what earlier steps kept of the cutoff block's output.

The paper's rule is `Latest`. The others are extensions of ours, with names of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from blockdance.adapters import Streams
from blockdance.errors import ConfigError

MAX_POINTS = 4


@dataclass(frozen=True)
class Kept:
    """What one step kept, of one guidance branch."""

    position: float
    """Its place in the run, in steps; a second evaluation within a step belongs to the next one."""
    entry: list[Any]
    """Shape, dtype and device of each stream that the first block saw; reuse asks for the same."""
    inputs: Streams | None
    """What the first block saw, if the rule wants it."""
    outputs: Streams
    """Of the cutoff block."""

    @property
    def nbytes(self) -> int:
        """All of it, wherever it lies."""
        return sum(stream.nbytes for stream in self._streams)

    @property
    def device_nbytes(self) -> int:
        """What of it lies where the model runs; the rest is in CPU memory."""
        where = {device.type for _, _, device in self.entry}
        return sum(stream.nbytes for stream in self._streams if stream.device.type in where)

    @property
    def _streams(self) -> Streams:
        return (*self.outputs, *(self.inputs or ()))


@runtime_checkable
class StorageRule(Protocol):
    """How kept outputs become the one that a reuse step starts from.

    A rule may have a method `stored(streams) -> Streams` too, which makes the copy that is kept: see `stored_by`.
    """

    @property
    def points(self) -> int:
        """How many of the last cache steps are kept, >= 1."""

    @property
    def wants_inputs(self) -> bool:
        """Whether it needs what the first block saw."""

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        """The cutoff block's outputs for a reuse step, as fresh tensors.

        Args:
            position: of the reuse step, in steps.
            kept: at least one, at most `points`, in order.
            inputs: what the first block sees now.
        """


@dataclass(frozen=True)
class Latest:
    """The paper's: the output of the last cache step as it is (Sec. 3.2)."""

    points = 1
    wants_inputs = False

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        return tuple(stream.clone() for stream in kept[-1].outputs)


PAPER = Latest()


@dataclass(frozen=True)
class Extrapolated:
    """The output of the last cache steps, continued to the reuse step by the polynomial through them.

    Not in the paper. Two points, a straight line, suit most; the steps just before the first cache step count as points
    too. Equal outputs give the same bits again. What leaves the range of the number format becomes its largest number.

    Raises:
        ConfigError: points outside [2, 4].
    """

    points: int = 2
    """Cache steps the polynomial goes through, in [2, 4]; as many tensors are kept."""
    wants_inputs = False

    def __post_init__(self) -> None:
        if not isinstance(self.points, int) or not 2 <= self.points <= MAX_POINTS:
            raise ConfigError(f"points must be an integer in [2, {MAX_POINTS}], got {self.points!r}")

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        if len(kept) == 1:
            return PAPER.outputs_at(position, kept, inputs)
        places = [one.position for one in kept]
        return tuple(continued(places, values, position) for values in zip(*(one.outputs for one in kept), strict=True))


def continued(places: Sequence[float], values: Sequence[Tensor], position: float) -> Tensor:
    """The polynomial through values, at another position, by Neville's scheme; within the range of the values' format.

    What lies between two lines of a scheme of several may be larger than what comes out, so it has a wide format.

    Args:
        places: ascending, at least two.
        values: one a place, of one shape and format.
        position: where to go on to.
    """
    dtype = values[0].dtype
    if len(values) > 2:
        values = [value.to(wide(dtype)) for value in values]
    for width in range(1, len(places)):
        spans = zip(places, places[width:], values, values[1:], strict=False)
        values = [held(torch.lerp(a, b, (position - left) / (right - left)), a.dtype) for left, right, a, b in spans]
    return held(values[0], dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format to calculate in."""
    return torch.promote_types(dtype, torch.float32)


def held(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value of our own in this format; what is beyond its range becomes its largest, as where models clip theirs."""
    largest = torch.finfo(dtype).max
    return value.clamp_(-largest, largest).to(dtype)


@dataclass(frozen=True)
class Residual:
    """What blocks 0..i added on the last cache step, added to what the first block sees now, so that it sees the latent.

    Not in the paper, which stores the raw output. The same input twice is equal to rounding only. What leaves the range of
    the number format becomes its largest number.
    """

    points = 1
    wants_inputs = True

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        last = kept[-1]
        assert last.inputs is not None, "a rule that wants inputs gets them"
        return tuple(
            held((out.to(wide(out.dtype)) - then) + now, out.dtype)
            for now, out, then in zip(inputs, last.outputs, last.inputs, strict=True)
        )


def stored_by(rule: StorageRule, streams: Streams) -> Streams:
    """A copy of our own to keep: as `rule.stored` makes it, or beside the original if the rule does not say.

    Args:
        rule: the storage rule.
        streams: what a block put out or saw; the model may write into them later.
    """
    own: Callable[[Streams], Streams] | None = getattr(rule, "stored", None)
    return tuple(stream.clone() for stream in streams) if own is None else own(streams)


def mapped(streams: Streams, change: Callable[[Tensor], Tensor]) -> Streams:
    """Kept streams, each changed, where they lie; those that know better how (`streams.mapped`) do it themselves."""
    own: Callable[[Callable[[Tensor], Tensor]], Streams] | None = getattr(streams, "mapped", None)
    return tuple(map(change, streams)) if own is None else own(change)


RULES: dict[str, StorageRule] = {"latest": PAPER, "extrapolated": Extrapolated()}
"""By the names of the command line and the page; the paper's comes first."""


def check_rule(storage: object) -> None:
    """Raise ConfigError unless it is a storage rule, and no name or class of one."""
    if isinstance(storage, type) or not isinstance(storage, StorageRule):
        raise ConfigError(f"storage must be a rule such as Latest() or Extrapolated(), got {storage!r}")


def rule_named(name: object) -> StorageRule:
    """One of RULES.

    Raises:
        ConfigError: no rule has that name.
    """
    if not isinstance(name, str) or name not in RULES:
        raise ConfigError(f"storage must be one of {', '.join(RULES)}, got {name!r}")
    return RULES[name]
