"""What decides on a schedule while a run is on (BlockDance-Ada, Sec. 3.3), as `accelerate` sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from blockdance.schedule import Schedule, StepKind
from blockdance.storage import StorageRule


@dataclass(frozen=True)
class Moment:
    """What a policy looks at, once in a run: the conditional branch, before the first step that is to be decided on."""

    latent: Tensor
    """(b, ...), one row a sample."""
    text: Tensor | None
    """(b, tokens, d); None for a model that takes no text."""
    text_mask: Tensor | None
    """(b, tokens) or broadcastable, 1 where there is a word; None if all count."""
    num_steps: int


@dataclass(frozen=True)
class Decision:
    """What a policy decided for one sample."""

    schedule: Schedule
    probabilities: tuple[float, ...]
    """Of a cache step, for every step from the first decided one on; below a half the step reuses."""


@runtime_checkable
class Policy(Protocol):
    """Looks at the latent of a run and decides the rest of it, for each sample."""

    @property
    def storage(self) -> StorageRule:
        """What reuse steps start from."""

    @property
    def cutoffs(self) -> Sequence[int]:
        """Every block whose output a reuse step may start from."""

    def decides_at(self, num_steps: int) -> int | None:
        """The first step that is decided on, at least 1; None if nothing can be reused in so few steps."""

    def check(self, transformer: nn.Module) -> None:
        """Raise PolicyError if it was trained for another model."""

    def decide(self, moment: Moment) -> list[Decision]:
        """One decision for each row of the latent."""


def undecided(first: int, num_steps: int) -> Schedule:
    """What a run does as long as nothing is decided: full steps, and a cache step just before the first decided one."""
    kinds = [StepKind.FULL] * num_steps
    kinds[first - 1] = StepKind.CACHE
    return Schedule(tuple(kinds), cutoff_block=0)
