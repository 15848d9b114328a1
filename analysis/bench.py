"""What the README claims, measured: speedup, overheads, a slider's move, the cache, the app."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.bench_app import measure_app, require_app
from analysis.bench_visitors import measure_visitors
from analysis.experiment import (
    Request,
    check_range,
    fewer_steps,
    figures,
    run_baseline,
    run_variant,
    sample,
    warm_up,
    with_sampler,
)
from analysis.host import measure_host
from analysis.metrics import PerceptualDistance, Picture, perceptual_distance, psnr, ssim
from analysis.records import Record, circumstances, kept, provenance, write_records
from analysis.speedup import MEASURED, speedup_of
from analysis.stopwatch import interleaved, paired_ratios, spread
from blockdance import ReuseConfig, Schedule, Trace, accelerate, fixed_schedule, load_demo_pipeline, observe

REQUEST = Request("red apple")
DIFFERENCE_PROMPTS = ("red apple", "octopus", "grinning face", "house with garden", "pizza", "cat face", "rocket", "tulip")
"""What the differences from the baseline are averaged over."""
INTERVALS = (2, 3)
REPEATS = 20
"""Rounds that make the whole bench take about five minutes on two cores."""
MAX_REPEATS = 1000
OVERHEAD_ROUNDS = 4
"""Times as many rounds for the overhead of N = 1, which must resolve below one percent."""

Key = Schedule | int
"""A run with a schedule, or the plain sampler with that many steps."""


@dataclass(frozen=True)
class Setup:
    """What every bench measures on."""

    pipe: Any
    view: Any
    """The pipeline with the request's sampler in place."""
    distance: PerceptualDistance
    repeats: int
    """Interleaved rounds, >= 1."""

    @property
    def num_blocks(self) -> int:
        return len(self.pipe.transformer.transformer_blocks)


def accelerated(view: Any, config: ReuseConfig | Schedule, request: Request) -> Picture:
    """One whole call as a user writes it, entering and leaving included."""
    with accelerate(view, config):
        return sample(view, request)


def observed(view: Any, request: Request) -> Picture:
    """One whole call that measures where features repeat."""
    with observe(view):
        return sample(view, request)


def cutoffs(num_blocks: int) -> list[int]:
    """Three cutoffs to compare: half of the depth, the default, the deepest possible."""
    default = fixed_schedule(ReuseConfig(), REQUEST.steps, num_blocks).cutoff_block
    return sorted({num_blocks // 2 - 1, default, num_blocks - 2})


def control_steps(schedule: Schedule, num_blocks: int) -> int:
    """Steps of the plain sampler that cost about what the schedule costs."""
    return fewer_steps(REQUEST, schedule.ideal_speedup(num_blocks)).steps


def measure_speedup(setup: Setup) -> list[Record]:
    """Baseline, every configuration and every control in the same rounds; differences over several prompts."""
    configs = [ReuseConfig(interval, cutoff) for interval in INTERVALS for cutoff in cutoffs(setup.num_blocks)]
    schedules = [fixed_schedule(config, REQUEST.steps, setup.num_blocks) for config in configs]
    traces = [run_variant(setup.pipe, REQUEST, schedule).trace for schedule in schedules]
    seconds = interleaved(speedup_runs(setup, schedules, REQUEST), setup.repeats, "speedup")
    differences = measure_differences(setup, schedules)
    return [
        speedup_record(config, schedule, trace, seconds, differences)
        | {"lpips_name": setup.distance.name, "difference_prompts": DIFFERENCE_PROMPTS}
        for config, schedule, trace in zip(configs, schedules, traces, strict=True)
    ]


def speedup_runs(setup: Setup, schedules: Sequence[Schedule], request: Request) -> dict[Key, Callable[[], Picture]]:
    """The baseline first, then each schedule, then each number of fewer steps once."""
    fewer = sorted({control_steps(schedule, setup.num_blocks) for schedule in schedules})
    runs: dict[Key, Callable[[], Picture]] = {request.steps: partial(sample, setup.view, request)}
    runs |= {schedule: partial(accelerated, setup.view, schedule, request) for schedule in schedules}
    return runs | {steps: partial(sample, setup.view, replace(request, steps=steps)) for steps in fewer}


def measure_differences(setup: Setup, schedules: Sequence[Schedule]) -> dict[Key, Record]:
    """For every run the mean difference of its pictures from the baseline's."""
    found: dict[Key, list[Record]] = {}
    for prompt in tqdm(DIFFERENCE_PROMPTS, desc="differences", unit="prompt"):
        request = replace(REQUEST, prompt=prompt)
        pictures = {key: run() for key, run in speedup_runs(setup, schedules, request).items()}
        for key, picture in pictures.items():
            found.setdefault(key, []).append(difference(pictures[request.steps], picture, setup.distance))
    return {key: mean_difference(each) for key, each in found.items()}


def difference(baseline: Picture, picture: Picture, distance: PerceptualDistance) -> Record:
    return {"lpips": distance(baseline, picture), "ssim": ssim(baseline, picture), "psnr": psnr(baseline, picture)}


def mean_difference(each: Sequence[Record]) -> Record:
    """Means over pictures; None for an infinite PSNR, as JSON has no infinity."""
    means = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    return {name: mean if np.isfinite(mean) else None for name, mean in means.items()}


def speedup_record(
    config: ReuseConfig,
    schedule: Schedule,
    trace: Trace,
    seconds: dict[Key, list[float]],
    differences: dict[Key, Record],
) -> Record:
    """One configuration beside its control with fewer steps."""
    steps, fewer = len(schedule), control_steps(schedule, trace.num_blocks)
    ours = speedup_figures(seconds[steps], seconds[schedule], trace.speedup_ideal)
    control = speedup_figures(seconds[steps], seconds[fewer], steps / fewer)
    return {
        "reuse_interval": config.reuse_interval,
        "cutoff_block": schedule.cutoff_block,
        "num_blocks": trace.num_blocks,
        "window_start": config.window_start,
        "window_end": config.window_end,
        "schedule": str(schedule),
        "repeats": len(seconds[steps]),
        **spread("baseline_seconds", seconds[steps]),
        **ours,
        "block_evaluations": trace.block_evaluations,
        "baseline_block_evaluations": trace.baseline_block_evaluations,
        **differences[schedule],
        "fewer_steps": {"steps": fewer, **control, **differences[fewer]},
    }


def speedup_figures(baseline: Sequence[float], ours: Sequence[float], ideal: float) -> Record:
    """Seconds, and the speedup with its quartiles and its share of the ideal."""
    measured = speedup_of(baseline, ours)
    return {
        **spread("seconds", ours),
        **measured,
        "speedup_ideal": ideal,
        "fraction_of_ideal": measured[MEASURED] / ideal,
    }


def compared(baseline: Callable[[], object], ours: Callable[[], object], repeats: int, what: str) -> Record:
    """Seconds of two runs, and how many times the baseline's seconds ours takes."""
    seconds = interleaved({"baseline": baseline, "ours": ours}, repeats, what)
    return {
        "repeats": repeats,
        **spread("baseline_seconds", seconds["baseline"]),
        **spread("seconds", seconds["ours"]),
        **spread("ratio_paired", paired_ratios(seconds["ours"], seconds["baseline"])),
    }


def measure_overhead(setup: Setup) -> list[Record]:
    """What `accelerate` costs where it never reuses."""
    plain, ours = partial(sample, setup.view, REQUEST), partial(accelerated, setup.view, ReuseConfig(1), REQUEST)
    return [without_reuse() | compared(plain, ours, OVERHEAD_ROUNDS * setup.repeats, "overhead")]


def measure_observe(setup: Setup) -> list[Record]:
    """What `observe` costs."""
    plain, ours = partial(sample, setup.view, REQUEST), partial(observed, setup.view, REQUEST)
    return [without_reuse() | compared(plain, ours, setup.repeats, "observe")]


def without_reuse() -> Record:
    return {"schedule": str(Schedule.dense(REQUEST.steps))}


def measure_slider(setup: Setup) -> list[Record]:
    """Seconds really spent on a new setting of a known baseline, its figures included."""
    baseline, schedule = run_baseline(setup.pipe, REQUEST), fixed_schedule(ReuseConfig(), REQUEST.steps, setup.num_blocks)

    def move() -> None:
        figures(baseline, run_variant(setup.pipe, REQUEST, schedule, baseline.recording), setup.distance)

    found = compared(partial(sample, setup.view, REQUEST), move, setup.repeats, "slider")
    facts = {"schedule": str(schedule), "cutoff_block": schedule.cutoff_block, "replayed_steps": schedule.shared_prefix}
    return [facts | found]


def measure_cache(setup: Setup) -> list[Record]:
    """Bytes held at most: without guidance (one branch) and with it (two)."""
    schedule, config = fixed_schedule(ReuseConfig(), REQUEST.steps, setup.num_blocks), setup.pipe.transformer.config
    held = {guidance: cache_bytes(setup, schedule, guidance) for guidance in (1.0, REQUEST.guidance)}
    return [
        {
            "schedule": str(schedule),
            "cutoff_block": schedule.cutoff_block,
            "repeats": 1,
            "cache_bytes_per_branch": held[1.0],
            "cache_bytes": held[REQUEST.guidance],
            "tokens": (config.sample_size // config.patch_size) ** 2,
            "width": config.num_attention_heads * config.attention_head_dim,
        }
    ]


def cache_bytes(setup: Setup, schedule: Schedule, guidance: float) -> int:
    return run_variant(setup.pipe, replace(REQUEST, guidance=guidance), schedule).trace.cache_bytes


def measure_application(setup: Setup) -> list[Record]:
    """Start of the app, and an answer it remembers."""
    return [measure_app(REQUEST, fixed_schedule(ReuseConfig(), REQUEST.steps, setup.num_blocks).cutoff_block, setup.repeats)]


def measure_many(setup: Setup) -> list[Record]:
    """Many visitors on one app."""
    return [measure_visitors(REQUEST, fixed_schedule(ReuseConfig(), REQUEST.steps, setup.num_blocks).cutoff_block)]


@dataclass(frozen=True)
class Bench:
    """One kind of measurement."""

    measures: str
    """What, as a phrase."""
    measure: Callable[[Setup], list[Record]]
    origin: Callable[[Any, Request], Record] = circumstances
    """Where, with what and on what it was measured."""


BENCHES = {
    "speedup": Bench(
        "seconds of the whole pipeline call, text encoder and decoder included, and the mean difference from the baseline",
        measure_speedup,
    ),
    "overhead": Bench("accelerate with reuse_interval 1 over the plain pipeline call", measure_overhead),
    "observe": Bench("observe over the plain pipeline call", measure_observe),
    "slider": Bench("a new setting with the shared steps replayed, figures included, over the baseline's call", measure_slider),
    "cache": Bench("bytes of stored block outputs, one tensor per guidance branch", measure_cache),
    "host": Bench(
        "microseconds of Python a step, around blocks that do nothing, in the plain pipeline and inside accelerate",
        lambda setup: measure_host(setup.repeats),
        lambda *_: provenance(),
    ),
    "app": Bench("app.py from its start to an answering page, and a comparison it remembers", measure_application),
    "visitors": Bench("the page for many visitors while one draws, and the app's memory over many runs", measure_many),
}


def check_bench(only: Sequence[str], repeats: int) -> None:
    """Raise BlockDanceError, before anything runs, if the bench cannot run."""
    check_range("repeats", repeats, 1, MAX_REPEATS, int)
    if {"app", "visitors"} & set(only):
        require_app()


def run_bench(only: Sequence[str], repeats: int, out: Path) -> list[Record]:
    """Run the chosen benches and rewrite the results file; records of the others in it are kept.

    Raises:
        BlockDanceError: repeats outside [1, 1000], no model, no app, or a results file that cannot be read.
    """
    check_bench(only, repeats)
    out.parent.mkdir(parents=True, exist_ok=True)
    others = kept(out, only)
    pipe = load_demo_pipeline()
    setup = Setup(pipe, with_sampler(pipe, REQUEST.sampler), perceptual_distance(), repeats)
    warm_up(pipe)
    records = [
        {"bench": name, "measures": BENCHES[name].measures} | found | BENCHES[name].origin(pipe, REQUEST)
        for name in BENCHES
        if name in only
        for found in BENCHES[name].measure(setup)
    ]
    write_records(out, [*others, *records])
    return records
