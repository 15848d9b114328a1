"""Every schedule worth having: dynamic programming over the errors that a profile expects of reuse steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blockdance.errors import ConfigError
from blockdance.profile import Expected, Profile, mixing_weights
from blockdance.schedule import Schedule, StepKind
from blockdance.storage import StorageRule

LONGEST = 6
"""Reuse steps in a row at most."""
MAX_POINTS = 2

Donors = tuple[int, ...]
"""The last steps on which all blocks ran, as many as the storage rule looks back to."""


@dataclass(frozen=True)
class Layer:
    """All that can be known at one step of the run: for each tuple of donors, by block evaluations saved."""

    cost: dict[Donors, NDArray[np.float64]]
    """Sum of the squared expected changes; infinite where that many cannot be saved."""
    came: dict[Donors, tuple[list[tuple[Donors, int | None]], NDArray[np.int64]]]
    """The ways to come here (donors before, and the cutoff block if the step reused), and which of them is the best."""


class Frontier:
    """For each number of block evaluations saved the schedule with the least expected change.

    Args:
        expected: the profile at the number of steps.
        num_steps: of the run.
        num_blocks: L.
        rule: what reuse steps start from.
        first: no step before this one reuses.

    Raises:
        ConfigError: a rule that looks back to more than two cache steps, or at the model's input.
    """

    def __init__(self, expected: Expected, num_steps: int, num_blocks: int, rule: StorageRule, first: int = 1) -> None:
        if rule.points > MAX_POINTS or rule.wants_inputs:
            raise ConfigError(
                f"storage must be Latest() or Extrapolated() of {MAX_POINTS} points to be planned with, got {rule!r}"
            )
        self.num_steps, self.num_blocks, self.rule, self.first = num_steps, num_blocks, rule, first
        self.expected = expected
        self._size = 1 + (num_steps - 1) * (max(expected.products) + 1)
        start = np.full(self._size, np.inf)
        start[0] = 0
        self.layers = [Layer({(0,): start}, {})]
        for step in range(1, num_steps):
            self.layers.append(self._next(step, self.layers[-1]))
        costs = np.min(list(self.layers[-1].cost.values()), axis=0)
        self.changes = np.sqrt(np.minimum.accumulate(costs[::-1])[::-1])
        """Least expected change for at least so many saved, ascending; infinite beyond what can be saved."""

    @property
    def most(self) -> int:
        """Block evaluations that can be saved at most."""
        return int(np.flatnonzero(np.isfinite(self.changes))[-1])

    def schedule(self, saved: int) -> Schedule:
        """The one with the least expected change that saves at least so many block evaluations."""
        costs = self.layers[-1].cost
        ends = [(donors, saved + int(np.argmin(cost[saved:]))) for donors, cost in costs.items()]
        donors, at = min(ends, key=lambda end: costs[end[0]][end[1]])
        cutoffs: list[int | None] = []
        for layer in reversed(self.layers[1:]):
            ways, best = layer.came[donors]
            donors, cutoff = ways[best[at]]
            at -= 0 if cutoff is None else cutoff + 1
            cutoffs.append(cutoff)
        return as_schedule([None, *reversed(cutoffs)], self.rule.points)

    def _next(self, step: int, before: Layer) -> Layer:
        """Let `step` run all blocks, or reuse up to any of the candidate blocks."""
        ways: dict[Donors, list[tuple[Donors, int | None]]] = {}
        costs: dict[Donors, list[NDArray[np.float64]]] = {}
        for donors, cost in before.cost.items():
            after = (*donors, step)[-self.rule.points :]
            ways.setdefault(after, []).append((donors, None))
            costs.setdefault(after, []).append(cost)
            if step < self.first or step - donors[-1] > LONGEST:
                continue
            weights = mixing_weights(self.rule, donors, step)
            for block in self.expected.products:
                change = self.expected.change(step, block, donors, weights)
                shifted = np.concatenate([np.full(block + 1, np.inf), cost[: -block - 1]])
                ways.setdefault(donors, []).append((donors, block))
                costs.setdefault(donors, []).append(shifted + change**2)
        best = {donors: np.argmin(several, axis=0) for donors, several in costs.items()}
        least = {donors: np.min(several, axis=0) for donors, several in costs.items()}
        return Layer(least, {donors: (ways[donors], best[donors]) for donors in ways})


def as_schedule(cutoffs: Sequence[int | None], points: int) -> Schedule:
    """The schedule that reuses where a cutoff is given; the steps that reuse steps look back to are its cache steps."""
    full = [step for step, cutoff in enumerate(cutoffs) if cutoff is None]
    looked_at = {
        donor
        for step, cutoff in enumerate(cutoffs)
        if cutoff is not None
        for donor in [earlier for earlier in full if earlier < step][-points:]
    }
    kinds = [
        StepKind.REUSE if cutoff is not None else StepKind.CACHE if step in looked_at else StepKind.FULL
        for step, cutoff in enumerate(cutoffs)
    ]
    return Schedule.with_cutoffs(kinds, [0 if cutoff is None else cutoff for cutoff in cutoffs])


def schedule_saving(profile: Profile, share: float, rule: StorageRule) -> tuple[Schedule, float]:
    """The schedule that saves a share of the block evaluations, or as much as can be, and the change expected of it."""
    frontier = Frontier(profile.expected(profile.steps), profile.steps, profile.num_blocks, rule)
    saved = min(frontier.most, round(share * profile.steps * profile.num_blocks))
    return frontier.schedule(saved), float(frontier.changes[saved])
