"""A schedule for a goal, from what a profile knows of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockdance.errors import ConfigError
from blockdance.frontier import Frontier
from blockdance.measure import Distance, OnRun, Pixels, measure_profile
from blockdance.profile import Profile, key_of
from blockdance.schedule import Schedule
from blockdance.storage import PAPER, StorageRule

QUANTILES = (0.05, 0.95)
"""Of the predicted distance, over pictures."""
SMALLEST_DISTANCE = 1e-7
"""Pictures nearer than this count as this near: little is left of a difference when they are rounded to 8 bits."""


@dataclass(frozen=True)
class Plan:
    """A schedule that was planned, and what is predicted of it."""

    schedule: Schedule
    storage: StorageRule
    """To be given to `accelerate` with the schedule."""
    speedup_ideal: float
    """From exact block counts."""
    predicted: float
    """The distance from the baseline's picture, as the profile names it, of the middle picture."""
    interval: tuple[float, float]
    """Of nine pictures out of ten."""
    distance: str
    """The name of that distance."""


@dataclass(frozen=True)
class Prediction:
    """From the expected change to the distance: a power law through a profile's outcomes, with their spread."""

    slope: float
    offset: float
    low: float
    high: float
    """Factors of the interval, as logarithms."""
    reach: float
    """The largest expected change that any outcome tells of; beyond it nothing is predicted."""

    @classmethod
    def fitted(cls, outcomes: Sequence[tuple[float, float]]) -> "Prediction":
        changes, distances = np.log(np.maximum(np.array(outcomes).T, SMALLEST_DISTANCE))
        slope, offset = np.polyfit(changes, distances, 1)
        low, high = np.quantile(distances - (slope * changes + offset), QUANTILES)
        return cls(float(slope), float(offset), float(low), float(high), max(change for change, _ in outcomes))

    def __call__(self, change: NDArray[np.float64] | float) -> tuple[Any, Any, Any]:
        """The distance expected, and the ends of its interval."""
        middle = self.slope * np.log(np.maximum(change, SMALLEST_DISTANCE)) + self.offset
        return np.exp(middle), np.exp(middle + self.low), np.exp(middle + self.high)


def plan(
    pipe: Any = None,
    *,
    target_speedup: float | None = None,
    max_lpips: float | None = None,
    prompts: Sequence[Any] = (),
    steps: int = 30,
    storage: StorageRule = PAPER,
    profile: Profile | None = None,
    one_cutoff: bool = False,
    call: dict[str, Any] | None = None,
    on_run: OnRun | None = None,
) -> Plan:
    """A schedule for a goal, which need not be regular and may reuse up to another block on every step.

    Without a profile one is measured first, which takes about 35 runs per prompt; `own_profile` makes one to keep.

    Args:
        pipe: a diffusers pipeline with a supported transformer; not needed with a profile.
        target_speedup: the ideal speedup to reach with the least difference, above 1; this or `max_lpips`.
        max_lpips: reuse as much as keeps the difference of nineteen pictures out of twenty below this, above 0.
        prompts: a few typical ones, for the profile: texts, or dictionaries of the pipeline's arguments.
        steps: sampling steps of the run.
        storage: what reuse steps will start from: `Latest()`, the paper's, or `Extrapolated()`.
        profile: one that was measured before, with any number of steps.
        one_cutoff: reuse up to the same block on all steps.
        call: further arguments of the pipeline's call, for the profile.
        on_run: called with (finished runs, number of runs) while a profile is measured.

    Raises:
        ConfigError: not one goal, or one that cannot be reached; the message names the nearest that can.
    """
    if (target_speedup is None) == (max_lpips is None):
        raise ConfigError(f"give one goal, target_speedup or max_lpips, got {target_speedup!r} and {max_lpips!r}")
    if profile is None:
        profile = own_profile(pipe, prompts, steps=steps, rules=[storage], call=call, on_run=on_run)
    planner = Planner(profile, steps, storage, one_cutoff)
    return planner.for_speedup(target_speedup) if max_lpips is None else planner.for_distance(max_lpips)


class Planner:
    """Plans for one number of steps; of several frontiers, one a cutoff, each goal takes the best.

    Raises:
        ConfigError: fewer than four steps, or a storage rule that the profile has no outcomes of.
    """

    def __init__(self, profile: Profile, steps: int, storage: StorageRule = PAPER, one_cutoff: bool = False) -> None:
        if key_of(storage) not in profile.outcomes:
            raise ConfigError(f"storage must be a rule the profile knows ({', '.join(profile.outcomes)}), got {storage!r}")
        self.profile, self.storage = profile, storage
        self.total = steps * profile.num_blocks
        self.predict = Prediction.fitted(profile.outcomes[key_of(storage)])
        expected = profile.expected(steps)
        choices = [expected.of(block) for block in profile.blocks] if one_cutoff else [expected]
        self.frontiers = [Frontier(choice, steps, profile.num_blocks, storage) for choice in choices]
        self.changes = [one.changes[one.changes <= self.predict.reach] for one in self.frontiers]
        """By block evaluations saved, as far as predictions reach."""

    @property
    def fastest(self) -> float:
        """The largest ideal speedup that can be planned for."""
        return self.total / (self.total - max(map(len, self.changes)) + 1)

    def for_speedup(self, target: Any) -> Plan:
        """The least difference that has at least this ideal speedup.

        Raises:
            ConfigError: a target that is no number above 1, or beyond reach.
        """
        if not is_number(target) or not 1 < target <= self.fastest:
            nearest = np.floor(100 * self.fastest) / 100
            self._check_reach(nearest > 1, f"target_speedup, got {target!r}")
            raise ConfigError(
                f"target_speedup must be above 1 and at most {nearest:.2f} with this model and steps, got {target!r}"
            )
        return self._plan(int(np.ceil(self.total * (1 - 1 / target) - 1e-9)))

    def for_distance(self, goal: Any) -> Plan:
        """The most speedup whose difference stays below this, for nineteen pictures out of twenty.

        Raises:
            ConfigError: a goal that is no number, or below what a single reuse step may do.
        """
        highs = [self.predict(changes)[2] for changes in self.changes]
        self._check_reach(self.fastest > 1, f"max_lpips, got {goal!r}")
        least = min(float(high[1]) for high in highs if len(high) > 1)
        if not is_number(goal) or not goal >= least:
            nearest = np.format_float_positional(1.005 * least, precision=3, fractional=False)  # rounded, and not down
            raise ConfigError(f"max_lpips must be at least {nearest}, which a single reuse step may cost here, got {goal!r}")
        return self._plan(max(int(np.flatnonzero(high <= goal)[-1]) for high in highs))

    def _check_reach(self, reaches: bool, goal: str) -> None:
        """Raise ConfigError if there is next to nothing to plan."""
        if not reaches:
            steps = self.total // self.profile.num_blocks
            raise ConfigError(f"nothing can be reused in {steps} steps with this model; take more steps for a {goal}")

    def _plan(self, saved: int) -> Plan:
        frontier = min(self.frontiers, key=lambda one: one.changes[saved] if saved < len(one.changes) else np.inf)
        schedule = frontier.schedule(saved)
        middle, low, high = (float(value) for value in self.predict(frontier.changes[saved]))
        speedup = schedule.ideal_speedup(self.profile.num_blocks)
        return Plan(schedule, self.storage, speedup, middle, (low, high), self.profile.distance)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def own_profile(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    steps: int = 30,
    rules: Sequence[StorageRule] = (PAPER,),
    call: dict[str, Any] | None = None,
    distance: Distance | None = None,
    distance_name: str = "distance",
    on_run: OnRun | None = None,
) -> Profile:
    """Measure a profile with the pipeline's own call, from the noise of seed 0; by default with LPIPS.

    Args:
        pipe: a diffusers pipeline with a supported transformer.
        prompts: a few typical ones: texts, or dictionaries of the pipeline's arguments.
        steps: sampling steps.
        rules: storage rules to plan for later.
        call: further arguments of the pipeline's call.
        distance: of two uint8 pictures.
        distance_name: what to call it.
        on_run: called with (finished runs, number of runs).

    Raises:
        ConfigError: no prompts, or fewer than four steps.
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    if distance is None:
        from analysis.metrics import difference, perceptual_distance

        lpips = perceptual_distance()
        distance, distance_name = lambda ours, theirs: difference(ours, theirs, lpips)["lpips"], lpips.name

    def draw(prompt: Any) -> Pixels:
        asked = {"num_inference_steps": steps, "output_type": "np"} | (call or {})
        asked |= prompt if isinstance(prompt, dict) else {"prompt": prompt}
        output = pipe(**asked, generator=torch.Generator().manual_seed(0))
        return np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[0])

    return measure_profile(pipe, prompts, draw, distance, distance_name, rules, on_run)
