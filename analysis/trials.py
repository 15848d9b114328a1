"""Storage rules that were tried and not kept, so that the log's figures can be had again: `python -m analysis trials`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.experiment import Request, run_baseline, sample, with_sampler
from analysis.metrics import PerceptualDistance, difference
from analysis.points import short
from analysis.tables import table
from blockdance import Extrapolated, Profile, ReuseConfig, Schedule, StepKind, accelerate, fixed_schedule, observe
from blockdance.adapters import Streams
from blockdance.plan import Planner
from blockdance.profile import Expected
from blockdance.storage import Kept, Latest, Residual, StorageRule

FITTED_ON = ("rainbow", "koala", "fire engine", "hedgehog", "lollipop", "crab", "bus", "sunrise")
TESTED_ON = (
    "red apple", "octopus", "grinning face", "house with garden", "pizza", "cat face", "rocket", "tulip", "ghost", "penguin",
    "castle", "butterfly",
)  # fmt: skip
STEPS, BLOCK, START = 30, 12, 0.1
BRANCHES = ("conditional", "unconditional")


@dataclass(frozen=True)
class HalfSlope:
    """Half of the way that the straight line goes."""

    points = 2
    wants_inputs = False

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        last = Latest().outputs_at(position, kept, inputs)
        line = Extrapolated().outputs_at(position, kept, inputs)
        return tuple(torch.lerp(a, b, 0.5) for a, b in zip(last, line, strict=True))


@dataclass(frozen=True)
class ResidualLine:
    """What blocks 0..i added on the last two cache steps, continued by a line and added to what the first block sees now."""

    points = 2
    wants_inputs = True

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        added = [
            Kept(one.position, [], None, tuple(out - then for out, then in zip(one.outputs, one.inputs or (), strict=True)))
            for one in kept
        ]
        line = Extrapolated().outputs_at(position, added, inputs)
        return tuple(now + change for now, change in zip(inputs, line, strict=True))


@dataclass(frozen=True)
class Fitted:
    """The mixture of the last cache steps with the least expected error, from a profile's inner products."""

    expected: Expected
    points: int
    wants_inputs = False

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        products, donors = self.expected.products[BLOCK], [round(one.position) for one in kept]
        among, towards = products[np.ix_(donors, donors)], products[donors, round(position)]
        weights = np.linalg.lstsq(among, towards, rcond=1e-9)[0]
        mixed = zip(*(one.outputs for one in kept), strict=True)
        return tuple(torch.stack([w * s for w, s in zip(weights.tolist(), each, strict=True)]).sum(0) for each in mixed)


@dataclass(frozen=True)
class Corrected:
    """Another rule's output, scaled and shifted channel by channel as fitted for each reuse step."""

    rule: StorageRule
    fits: dict[int, tuple[Tensor, Tensor]]

    @property
    def points(self) -> int:
        return self.rule.points

    @property
    def wants_inputs(self) -> bool:
        return self.rule.wants_inputs

    def outputs_at(self, position: float, kept: Sequence[Kept], inputs: Streams) -> Streams:
        scale, shift = self.fits[round(position)]
        return tuple(stream * scale + shift for stream in self.rule.outputs_at(position, kept, inputs))


def donors_of(schedule: Schedule, rule: StorageRule) -> Iterator[tuple[int, list[int]]]:
    """Each reuse step with the steps it starts from."""
    ran: list[int] = []
    for step, kind in enumerate(schedule):
        if kind is StepKind.REUSE:
            yield step, ran[-rule.points :]
        else:
            ran.append(step)


def corrected(states: Tensor, rule: StorageRule, schedule: Schedule, shift_only: bool = False) -> Corrected:
    """Scale and shift of every channel by least squares over tokens, for every reuse step; states (steps, tokens, width)."""
    fits = {}
    for step, donors in donors_of(schedule, rule):
        kept = [Kept(donor, [], None, (states[donor],)) for donor in donors]
        given, wanted = rule.outputs_at(step, kept, ())[0], states[step]
        around, towards = given - given.mean(0), wanted - wanted.mean(0)
        scale = torch.ones(given.shape[1]) if shift_only else (around * towards).sum(0) / around.square().sum(0)
        fits[step] = (scale, wanted.mean(0) - scale * given.mean(0))
    return Corrected(rule, fits)


def states_of(pipe: Any, prompt: str) -> Tensor:
    """What BLOCK puts out on every step of a plain run, tokens of both guidance branches together, (steps, tokens, width)."""
    view = with_sampler(pipe, Request.sampler)
    with observe(view, keep_blocks=[BLOCK]) as observation:
        sample(view, Request(prompt, steps=STEPS))
    return torch.cat([observation.features(BLOCK, branch).flatten(1, 2) for branch in BRANCHES], dim=1)


def schedules(profile: Profile) -> dict[str, Schedule]:
    """What rules are tried on."""
    line, config = Extrapolated(), ReuseConfig(2, BLOCK, START)
    planner = Planner(profile, STEPS, line, one_cutoff=True)
    return {
        "N=2": fixed_schedule(config, STEPS, profile.num_blocks),
        "N=3": fixed_schedule(ReuseConfig(3, BLOCK, START), STEPS, profile.num_blocks),
        "N=3 to the end": fixed_schedule(ReuseConfig(3, BLOCK, START, 1.0), STEPS, profile.num_blocks),
        "planned 2x": planner.for_speedup(2.0).schedule,
    }


def rules(pipe: Any, profile: Profile) -> dict[str, Callable[[Schedule], StorageRule]]:
    """By name, what makes a rule for a schedule."""
    expected, line, latest = profile.expected(STEPS), Extrapolated(), Latest()
    states = torch.cat([states_of(pipe, prompt) for prompt in tqdm(FITTED_ON, desc="fitting")], dim=1)
    return {
        "latest, the paper's": lambda _: latest,
        "extrapolated": lambda _: line,
        "half of the slope": lambda _: HalfSlope(),
        "residual": lambda _: Residual(),
        "line of the residual": lambda _: ResidualLine(),
        "fitted, 2 points": lambda _: Fitted(expected, 2),
        "fitted, 3 points": lambda _: Fitted(expected, 3),
        "latest, corrected": lambda schedule: corrected(states, latest, schedule),
        "extrapolated, corrected": lambda schedule: corrected(states, line, schedule),
        "extrapolated, shifted": lambda schedule: corrected(states, line, schedule, shift_only=True),
    }


def run_trials(
    pipe: Any, profile: Profile, distance: PerceptualDistance, prompts: Sequence[str] = TESTED_ON
) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and worst LPIPS to the baseline over prompts, by rule and schedule."""
    plans, made = schedules(profile), rules(pipe, profile)
    fitted = {name: {label: make(plan) for label, plan in plans.items()} for name, make in made.items()}
    found: dict[tuple[str, str], list[float]] = {}
    for prompt in tqdm(prompts, desc="trials", unit="prompt"):
        baseline = run_baseline(pipe, Request(prompt, steps=STEPS))
        for name, each in fitted.items():
            for label, rule in each.items():
                view = with_sampler(pipe, Request.sampler)
                with accelerate(view, plans[label], storage=rule, replay=baseline.recording):
                    picture = sample(view, baseline.request)
                found.setdefault((name, label), []).append(difference(baseline.picture, picture, distance)["lpips"])
    return {name: {label: (float(np.mean(found[name, label])), max(found[name, label])) for label in plans} for name in made}


def cutoffs_that_deepen(profile: Profile, speedup: float = 2.0) -> dict[str, float]:
    """The LPIPS that the planner expects with one cutoff, and with another on every step."""
    planners = {
        "one cutoff": Planner(profile, STEPS, Extrapolated(), one_cutoff=True),
        "a cutoff for each step": Planner(profile, STEPS, Extrapolated()),
    }
    return {name: planner.for_speedup(speedup).predicted for name, planner in planners.items()}


def render_trials(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """A row for each rule."""
    labels = list(next(iter(found.values())))
    rows = [
        [name, *(f"{short(each[label][0])}, worst {short(each[label][1])}" for label in labels)] for name, each in found.items()
    ]
    return table(["what a reuse step starts from", *labels], rows)
