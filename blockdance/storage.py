"""What a reuse step starts from, made of what earlier steps kept of the cutoff block's output.

The paper's rule is `Latest`. The others are extensions of ours, with names of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

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
        return sum(stream.nbytes for stream in (*self.outputs, *(self.inputs or ())))


@runtime_checkable
class StorageRule(Protocol):
    """How kept outputs become the one that a reuse step starts from."""

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


@dataclass(frozen=True)
class Extrapolated:
    """The output of the last cache steps, continued to the reuse step by the polynomial through them.

    Not in the paper. Two points, a straight line, suit most; the steps just before the first cache step count as points
    too. Equal outputs give the same bits again.

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
        """By Neville's scheme."""
        places, values = [one.position for one in kept], [one.outputs for one in kept]
        for width in range(1, len(kept)):
            spans = zip(places, places[width:], values, values[1:], strict=False)
            values = [lerped(a, b, (position - left) / (right - left)) for left, right, a, b in spans]
        return values[0] if len(kept) > 1 else Latest().outputs_at(position, kept, inputs)


def stored_by(rule: StorageRule, outputs: Streams) -> Streams:
    """Our own copy of what a block put out, where the rule wants it: a rule may say so by a method `stored`."""
    stored = getattr(rule, "stored", None)
    return tuple(stream.clone() for stream in outputs) if stored is None else stored(outputs)


def lerped(start: Streams, end: Streams, weight: float) -> Streams:
    """`start` at weight 0, `end` at 1, and the straight line through them beyond."""
    return tuple(torch.lerp(a, b, weight) for a, b in zip(start, end, strict=True))


@dataclass(frozen=True)
class Residual:
    """What blocks 0..i added on the last cache step, added to what the first block sees now, so that it sees the latent.

    Not in the paper, which stores the raw output. The same input twice is equal to rounding only.
    """

    points = 1
    wants_inputs = True

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        last = kept[-1]
        assert last.inputs is not None, "a rule that wants inputs gets them"
        return tuple(now + (out - then) for now, out, then in zip(inputs, last.outputs, last.inputs, strict=True))


RULES: dict[str, StorageRule] = {"latest": Latest(), "extrapolated": Extrapolated()}
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
