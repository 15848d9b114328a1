"""N = 2, 3 and 4, each beside the plain sampler with as many fewer steps as cost the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.experiment import Baseline, Request, control_figures, fewer_steps, figures, run_baseline, run_variant
from analysis.metrics import PerceptualDistance
from analysis.records import Record
from analysis.speedup import speedup_in
from analysis.timing import Timing, time_interleaved
from blockdance import ReuseConfig, Schedule, fixed_schedule

INTERVALS = (2, 3, 4)


@dataclass(frozen=True)
class Rival:
    """A schedule, and the control beside it."""

    config: ReuseConfig
    schedule: Schedule
    speedup_ideal: float
    control: Request
    """The plain sampler at the same cost."""


def rivals_of(config: ReuseConfig, request: Request, num_blocks: int) -> list[Rival]:
    """One for each of INTERVALS; all else as in `config`."""
    configs = [replace(config, reuse_interval=interval) for interval in INTERVALS]
    schedules = [fixed_schedule(one, request.steps, num_blocks) for one in configs]
    speedups = [schedule.ideal_speedup(num_blocks) for schedule in schedules]
    controls = [fewer_steps(request, speedup) for speedup in speedups]
    return [Rival(*parts) for parts in zip(configs, schedules, speedups, controls, strict=True)]


def timed(pipe: Any, request: Request, rivals: Sequence[Rival], rounds: int) -> dict[Schedule | int, Timing]:
    """Schedules and controls, by schedule and by number of steps, in interleaved rounds."""
    return time_interleaved(pipe, request, [*(one.schedule for one in rivals), *(one.control.steps for one in rivals)], rounds)


def compared(
    pipe: Any, request: Request, rivals: Sequence[Rival], distance: PerceptualDistance
) -> tuple[Baseline, list[tuple[Record, Record]]]:
    """The baseline, and for each rival its figures against it and those of its control."""
    baseline, pairs = run_baseline(pipe, request), []
    for rival in rivals:
        variant = run_variant(pipe, request, rival.schedule, baseline.recording)
        control = run_baseline(pipe, replace(request, steps=rival.control.steps))
        pairs.append((figures(baseline, variant, distance), control_figures(baseline, control, distance)))
    return baseline, pairs


def line_of(rival: Rival, timings: Mapping[Schedule | int, Timing], ours: Record, theirs: Record) -> Record:
    """What a results file says of a rival: its setting, its figures, and under `fewer_steps` its control's."""
    steps, config = rival.control.steps, rival.config
    return (
        {"reuse_interval": config.reuse_interval, "schedule": str(rival.schedule), "cutoff_block": rival.schedule.cutoff_block}
        | {"window_start": config.window_start, "window_end": config.window_end}
        | {"speedup_ideal": rival.speedup_ideal} | timings[rival.schedule] | ours
        | {"fewer_steps": {"steps": steps, "speedup_ideal": len(rival.schedule) / steps} | timings[steps] | theirs}
    )  # fmt: skip


def row(line: Record, lead: Sequence[str], cells: Callable[[Record], list[str]]) -> list[str]:
    """One row: `lead`, the speedups and `cells` of a line, and the same of its control."""
    fewer = line["fewer_steps"]

    def told(one: Record) -> list[str]:
        return [str(speedup_in(one)), *cells(one)]

    control = f"{fewer['steps']} steps, ideal {fewer['speedup_ideal']:.2f}x"
    return [*lead, f"{line['speedup_ideal']:.2f}x", *told(line), control, *told(fewer)]
