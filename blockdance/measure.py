"""Measure a profile: draw a few prompts plainly and, replaying those runs, with reuse here and there."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockdance.accelerate import accelerate
from blockdance.errors import ConfigError
from blockdance.frontier import schedule_saving
from blockdance.observe import Observation, observe
from blockdance.profile import Products, Profile, key_of
from blockdance.replay import Recording, record
from blockdance.schedule import MIN_STEPS, Schedule, StepKind, default_cutoff
from blockdance.scheduled import depth_of
from blockdance.storage import PAPER, StorageRule

Pixels = NDArray[np.floating]
"""In [0, 1], (height, width, 3), or (frames, height, width, 3)."""
Draw = Callable[[Any], Pixels]
"""Draws a prompt with the pipeline, always from the same noise."""
Distance = Callable[[NDArray[np.uint8], NDArray[np.uint8]], float]
"""How far two drawn pictures are apart, 0 for equal ones."""
OnRun = Callable[[int, int], None]
"""Called with (finished runs, number of runs)."""

PROBES = 9
"""Places in the run where the effect of one reuse step is measured; between them it is interpolated."""
SAVINGS = (0.12, 0.24, 0.36, 0.48, 0.58, 0.66, 0.74)
"""Shares of the block evaluations that are saved in the runs which tie predictions to pictures."""
SMALLEST_ERROR = 1e-9


@dataclass(frozen=True)
class Drawn:
    """The baseline of one prompt."""

    prompt: Any
    pixels: Pixels
    recording: Recording
    products: dict[int, Products]


@dataclass
class Studio:
    """Draws prompts with and without reuse, and says how far it is."""

    pipe: Any
    draw: Draw
    on_run: OnRun | None
    runs: int
    finished: int = field(default=0)

    def baseline(self, prompt: Any, blocks: Sequence[int]) -> Drawn:
        """Draw plainly, keep the run, and how these blocks' outputs lie to each other over the steps."""
        with ExitStack() as stack:
            recording = stack.enter_context(record(self.pipe))
            observation = stack.enter_context(observe(self.pipe, keep_blocks=blocks))
            pixels = self.draw(prompt)
        self._finish()
        return Drawn(prompt, pixels, recording, {block: products_of(observation, block) for block in blocks})

    def again(self, one: Drawn, schedule: Schedule, rule: StorageRule = PAPER) -> Pixels:
        """The same prompt with reuse."""
        with accelerate(self.pipe, schedule, storage=rule, replay=one.recording):
            pixels = self.draw(one.prompt)
        self._finish()
        return pixels

    def _finish(self) -> None:
        self.finished += 1
        if self.on_run is not None:
            self.on_run(self.finished, self.runs)


def measure_profile(
    pipe: Any,
    prompts: Sequence[Any],
    draw: Draw,
    distance: Distance,
    distance_name: str,
    rules: Sequence[StorageRule],
    on_run: OnRun | None = None,
) -> Profile:
    """What the planner needs to know of a model; 28 to 42 runs for each prompt, none of them whole but the first.

    The hidden states of three blocks are held for all steps of one run, on the CPU.

    Args:
        pipe: a diffusers pipeline with a supported transformer.
        prompts: what to draw; the more, the better the prediction's interval.
        draw: draws one of them with `pipe`, always from the same noise.
        distance: of two drawn pictures.
        distance_name: what to call it.
        rules: storage rules to predict for.
        on_run: called with (finished runs, number of runs).

    Raises:
        ConfigError: no prompts, or runs of fewer than four steps.
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    if not prompts:
        raise ConfigError("prompts must name at least one thing to draw, got none")
    num_blocks = depth_of(pipe)
    blocks = candidate_blocks(num_blocks)
    studio = Studio(pipe, draw, on_run, len(prompts) * runs_per_prompt(PROBES, blocks, rules))
    baselines = [studio.baseline(prompt, blocks) for prompt in prompts]
    steps = len(baselines[0].recording.trace.steps)
    if steps < MIN_STEPS:
        raise ConfigError(f"steps must be at least {MIN_STEPS} to reuse anything, got {steps}")
    places = sorted({int(place) for place in np.round(np.linspace(1, steps - 1, PROBES))})
    studio.runs = len(prompts) * runs_per_prompt(len(places), blocks, rules)
    profile = Profile(
        model=type(pipe.transformer).__name__,
        num_blocks=num_blocks,
        steps=steps,
        prompts=len(prompts),
        distance=distance_name,
        products={block: np.mean([one.products[block] for one in baselines], axis=0) for block in blocks},
        probed=tuple(place / (steps - 1) for place in places),
        sensitivity={
            block: tuple(root_mean_square([effect(studio, one, step, block) for one in baselines]) for step in places)
            for block in blocks
        },
    )
    for rule in rules:
        profile.outcomes[key_of(rule)] = outcomes(studio, baselines, profile, rule, distance)
    return profile


def runs_per_prompt(places: int, blocks: Sequence[int], rules: Sequence[StorageRule]) -> int:
    return 1 + places * len(blocks) + len(SAVINGS) * len(rules)


def candidate_blocks(num_blocks: int) -> list[int]:
    """Cutoffs to choose from: the deepest, the paper's three quarters, and half of the depth."""
    return sorted({num_blocks - 2, default_cutoff(num_blocks), max(0, num_blocks // 2 - 1)})


def products_of(observation: Observation, block: int) -> Products:
    """Inner products of a block's outputs at any two steps, summed over guidance branches, of mean square length 1."""
    states = [observation.features(block, branch).flatten(1).double() for branch in observation.branches]
    products: Products = np.sum([(one @ one.T).numpy() for one in states], axis=0)
    return products / np.mean(np.diag(products))


def effect(studio: Studio, one: Drawn, step: int, block: int) -> float:
    """What one reuse step changes in the picture, over the error in what it started from."""
    kinds = [StepKind.FULL] * len(one.recording.trace.steps)
    kinds[step - 1 : step + 1] = [StepKind.CACHE, StepKind.REUSE]
    change = root_mean_square(studio.again(one, Schedule(tuple(kinds), block)) - one.pixels)
    products = one.products[block]
    squared = products[step, step] + products[step - 1, step - 1] - 2 * products[step, step - 1]
    return max(change, SMALLEST_ERROR) / float(np.sqrt(max(squared, SMALLEST_ERROR**2)))


def outcomes(
    studio: Studio, baselines: Sequence[Drawn], profile: Profile, rule: StorageRule, distance: Distance
) -> list[tuple[float, float]]:
    """Plan for several savings, run the plans, and set the expected change beside the distance."""
    pairs = []
    for share in SAVINGS:
        schedule, change = schedule_saving(profile, share, rule)
        pairs += [(change, distance(rounded(one.pixels), rounded(studio.again(one, schedule, rule)))) for one in baselines]
    return pairs


def root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def rounded(pixels: Pixels) -> NDArray[np.uint8]:
    return (pixels * 255).round().astype(np.uint8)
