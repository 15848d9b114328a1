"""Whether a schedule for each picture is worth it: BlockDance-Ada beside schedules that look at no picture."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.compare import read_prompts
from analysis.experiment import Baseline, Request, Variant, run_baseline, run_variant, warm_up
from analysis.metrics import PerceptualDistance, difference
from analysis.pictures import as_jpeg_bytes
from analysis.records import RESULTS, Record, append_records, provenance, read_records
from blockdance import Profile, ReuseConfig, Schedule, StepKind, fixed_schedule
from blockdance.ada import POLICY_FILE, AdaPolicy
from blockdance.frontier import Frontier
from blockdance.plan import Planner

ADA_RESULTS = RESULTS.with_name("ada.jsonl")
HELD_OUT = POLICY_FILE.with_name("held_out.txt")
SAVINGS = (0.25, 0.4, 0.55, 0.7)
INTERVALS = (2, 3, 4)
SPEEDUPS = (1.2, 1.35, 1.5, 1.7)
SHARES = (25, 21, 18)
"""Plain steps, of 30."""
KEY = ("method", "knob", "prompt", "steps")


@dataclass(frozen=True)
class Rivals:
    """What Ada is held against, all starting reuse steps from the same rule and block."""

    policy: AdaPolicy
    profile: Profile

    def schedules(self, steps: int) -> Iterator[tuple[str, str, Schedule]]:
        """Method, knob and schedule of those that look at no picture."""
        blocks, cutoff = self.profile.num_blocks, self.policy.cutoffs[-1]
        for interval in INTERVALS:
            yield "fixed", f"N={interval}", fixed_schedule(ReuseConfig(interval, cutoff), steps, blocks)
        planner, late = Planner(self.profile, steps, self.policy.storage), self.late(steps)
        for speedup in SPEEDUPS:
            yield "planned", f"{speedup:g}x", planner.for_speedup(min(speedup, planner.fastest)).schedule
        for saving in SAVINGS:
            decided = steps - late.first
            yield "planned-late", f"{saving:g}", late.schedule(min(late.most, round(saving * decided) * (cutoff + 1)))

    def late(self, steps: int) -> Frontier:
        """The planner's schedules that reuse only where the policy decides."""
        first = self.policy.decides_at(steps) or steps
        expected = self.profile.expected(steps).of(self.policy.cutoffs[-1])
        return Frontier(expected, steps, self.profile.num_blocks, self.policy.storage, first)


def shuffled(schedule: Schedule, first: int, chance: random.Random) -> Schedule:
    """As many reuse steps from `first` on, at random places."""
    kinds, cutoffs = list(schedule.kinds), [schedule.cutoff_at(step) for step in range(len(schedule))]
    order = list(range(first, len(schedule)))
    chance.shuffle(order)
    places = [*range(first), *order]
    return Schedule.with_cutoffs([kinds[place] for place in places], [cutoffs[place] for place in places])


def measure(
    pipe: Any, policy: AdaPolicy, profile: Profile, prompts: Sequence[str], steps: Sequence[int],
    distance: PerceptualDistance, out: Path,
) -> list[Record]:  # fmt: skip
    """Draw every prompt with Ada and its rivals, one line for each; what the file has is not drawn again.

    Args:
        pipe: the pipeline.
        policy: for that pipeline.
        profile: for the planner.
        prompts: none of them seen in training.
        steps: numbers of sampling steps.
        distance: the perceptual distance.
        out: results file.

    Returns:
        All lines of the file.
    """
    lines = read_records(out) if out.exists() else []
    known = {key_of(line) for line in lines}
    requests = [Request(prompt, steps=number) for number in steps for prompt in prompts]
    left = [one for one in requests if ("ada", f"{SAVINGS[-1]:g}", one.prompt, one.steps) not in known]
    rivals, cached = Rivals(policy, profile), {}
    if left:
        warm_up(pipe)
    for request in tqdm(left, desc="ada", unit="prompt"):
        if request.steps not in cached:
            cached[request.steps] = list(rivals.schedules(request.steps))
        drawn = lines_of(pipe, request, policy, cached[request.steps], distance)
        fresh = [line for line in drawn if key_of(line) not in known]  # some are where a write was cut off
        append_records(out, fresh)
        lines += fresh
    return lines


def key_of(line: Record) -> tuple[Any, ...]:
    return tuple(line[name] for name in KEY)


def lines_of(
    pipe: Any, request: Request, policy: AdaPolicy, given: Sequence[tuple[str, str, Schedule]],
    distance: PerceptualDistance,
) -> Iterator[Record]:  # fmt: skip
    """One request: schedules that look at no picture, fewer steps, as many reuse steps as Ada's at random places, and Ada."""
    baseline = run_baseline(pipe, request)
    first = policy.decides_at(request.steps) or request.steps
    common = provenance() | {"bench": "ada", "prompt": request.prompt, "seed": request.seed, "steps": request.steps}
    common |= {"sampler": request.sampler, "guidance": request.guidance, "lpips_name": distance.name}
    common |= {"jpeg_bytes": len(as_jpeg_bytes(baseline.picture))}
    storage = policy.config.storage_name

    def line(method: str, knob: str, variant: Variant) -> Record:
        return common | {"method": method, "knob": knob} | outcome(baseline, variant, first, distance)

    def run(plan: Schedule | AdaPolicy) -> Variant:
        return run_variant(pipe, request, plan, baseline.recording, storage=storage)

    for method, knob, schedule in given:
        yield line(method, knob, run(schedule))
    for share in SHARES:
        fewer = run_baseline(pipe, replace(request, steps=round(share * request.steps / 30)))
        dense = Schedule.dense(fewer.request.steps)
        plain = Variant(dense, fewer.picture, fewer.recording.trace, fewer.outside_seconds)
        yield line("fewer-steps", f"{share} of 30", plain) | {"speedup_ideal": request.steps / len(dense)}
    for saving in SAVINGS:
        decided = run(policy.with_saving(saving))
        chance = random.Random(f"{request.prompt} {saving} {request.steps}")
        yield line("random", f"{saving:g}", run(shuffled(decided.schedule, first, chance)))
        yield line("ada", f"{saving:g}", decided)


def outcome(baseline: Baseline, variant: Variant, first: int, distance: PerceptualDistance) -> Record:
    """Figures of one run; replayed steps count with the seconds that they took in the baseline."""
    kinds = list(variant.schedule)[first:]
    return {
        "schedule": str(variant.schedule),
        "cutoff_block": variant.schedule.cutoff_block,
        "reused": sum(kind is StepKind.REUSE for kind in variant.schedule),
        "decided": len(kinds),
        "speedup_ideal": variant.trace.speedup_ideal,
        "seconds": variant.seconds,
        "baseline_seconds": baseline.seconds,
    } | difference(baseline.picture, variant.picture, distance)


def held_out() -> list[str]:
    """128 prompts that no training of a policy, and no profile, has seen."""
    return read_prompts(HELD_OUT)
