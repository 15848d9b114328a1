"""What BlockDance saves and costs at full size, with random weights, on the GPU if there is one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.architectures import ARCHITECTURES, Sampler, sampler_for, with_random_weights
from analysis.experiment import MAX_STEPS, check_range
from analysis.records import RESULTS, BenchError, Record, provenance, read_records, write_records
from analysis.stopwatch import interleaved, now, paired_ratios, seconds_of, spread
from blockdance import MIN_STEPS, Schedule, Trace, accelerate, fixed_schedule
from blockdance.presets import PRESETS

FULL_SIZE_RESULTS = RESULTS.with_name("full_size.jsonl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL_SIZE_REPEATS = 3
CPU_STEPS = 20
"""What a CPU does by default where the preset has more; the fractions of the run stay the same."""
WARM_UP_STEPS = MIN_STEPS
MAX_BATCH = 64
KEY = ("architecture", "batch", "reuse_interval", "steps", "dtype", "device", "compiled")
"""What tells one measurement from another; it is not made again while the results file has it."""


@dataclass(frozen=True)
class Job:
    """What `bench --model` is asked for.

    Raises:
        RequestError: a value outside its range.
        BenchError: no such architecture or dtype.
    """

    name: str
    """A key of ARCHITECTURES."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Samples drawn together; guidance doubles the rows."""
    intervals: tuple[int, ...] = (2, 3, 4)
    steps: int | None = None
    """None: the preset's."""
    repeats: int = FULL_SIZE_REPEATS
    dtype: str = "bfloat16"
    """A key of DTYPES."""
    compiled: bool = False

    def __post_init__(self) -> None:
        defaults(self.name)
        if self.dtype not in DTYPES:
            raise BenchError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for batch in self.batches:
            check_range("batch", batch, 1, MAX_BATCH, int)
        for interval in self.intervals:
            check_range("intervals", interval, 2, MAX_STEPS, int)
        if self.steps is not None:
            check_range("steps", self.steps, MIN_STEPS, MAX_STEPS, int)
        check_range("repeats", self.repeats, 1, 1000, int)

    @property
    def run_steps(self) -> int:
        """Sampling steps of every run."""
        return self.steps or PRESETS[self.name].steps

    def schedule(self, interval: int, num_blocks: int) -> Schedule:
        """The paper's, with another N."""
        config = PRESETS[self.name].config
        cutoff = min(config.cutoff_block or 0, num_blocks - 2)
        return fixed_schedule(replace(config, reuse_interval=interval, cutoff_block=cutoff), self.run_steps, num_blocks)

    def key(self, batch: int, interval: int) -> tuple[Any, ...]:
        """Of the record that measures this."""
        return self.name, batch, interval, self.run_steps, self.dtype, device_here().type, self.compiled


def defaults(name: str) -> tuple[tuple[int, ...], int | None]:
    """Batch sizes and steps where none are asked for: everything on a GPU, a reduced set on a CPU.

    Raises:
        BenchError: no such architecture.
    """
    if name not in ARCHITECTURES:
        raise BenchError(f"model must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if device_here().type == "cuda":
        return (1, 4, 16), None
    return (1,), min(CPU_STEPS, PRESETS[name].steps)


def run_full_size(job: Job, out: Path) -> list[Record]:
    """Measure what the results file does not have yet, and write it after every batch size.

    Returns:
        All records of the file.

    Raises:
        BenchError: the results file cannot be read.
    """
    records = read_records(out) if out.exists() else []
    missing = {
        batch: intervals
        for batch in job.batches
        if (intervals := [n for n in job.intervals if not any(key_of(record) == job.key(batch, n) for record in records)])
    }
    if missing:
        model = with_random_weights(ARCHITECTURES[job.name].build, device_here(), DTYPES[job.dtype])
        for block in blocks_of(model) if job.compiled else []:
            block.compile(fullgraph=True)
    for batch, intervals in missing.items():
        sampler = sampler_for(job.name, model, batch)
        records += measure(job, sampler, batch, intervals)
        write_records(out, records)
    return records


def measure(job: Job, sampler: Sampler, batch: int, intervals: list[int]) -> list[Record]:
    """The baseline and every interval in the same rounds."""
    steps, num_blocks = job.run_steps, len(blocks_of(sampler.transformer))
    schedules = {interval: job.schedule(interval, num_blocks) for interval in intervals}
    sampler(WARM_UP_STEPS)
    traces = {interval: accelerated(sampler, schedule) for interval, schedule in schedules.items()}
    runs: dict[int, Callable[[], object]] = {1: partial(sampler, steps)}
    runs |= {interval: partial(accelerated, sampler, schedule) for interval, schedule in schedules.items()}
    seconds = interleaved(runs, job.repeats, f"{job.name}, batch {batch}")
    peaks = {interval: peak_bytes(run) for interval, run in runs.items()}
    common = provenance() | {
        "bench": "full_size",
        "architecture": job.name,
        "num_blocks": num_blocks,
        "parameters": sum(weight.numel() for weight in sampler.transformer.parameters()),
        "batch": batch,
        "steps": steps,
        "preset_steps": PRESETS[job.name].steps,
        "dtype": job.dtype,
        "device": device_here().type,
        "compiled": job.compiled,
        "repeats": job.repeats,
        "outside_fraction": outside_fraction(sampler, steps),
        "baseline_peak_bytes": peaks[1],
    }
    return [
        common | {"peak_bytes": peaks[interval]} | speedup(job, interval, schedules[interval], traces[interval], seconds)
        for interval in intervals
    ]


def speedup(job: Job, interval: int, schedule: Schedule, trace: Trace, seconds: dict[int, list[float]]) -> Record:
    """Measured and ideal, of one interval."""
    ours = spread("seconds", seconds[interval])
    baseline = spread("baseline_seconds", seconds[1])
    measured = float(baseline["baseline_seconds"]) / float(ours["seconds"])  # type: ignore[arg-type]
    return {
        "reuse_interval": interval,
        "cutoff_block": schedule.cutoff_block,
        "schedule": str(schedule),
        "speedup_measured": measured,
        **spread("speedup_paired", paired_ratios(seconds[1], seconds[interval])),
        "speedup_ideal": trace.speedup_ideal,
        "fraction_of_ideal": measured / trace.speedup_ideal,
        "block_evaluations": trace.block_evaluations,
        "baseline_block_evaluations": trace.baseline_block_evaluations,
        "cache_bytes": trace.cache_bytes,
        "paper_speedup": ARCHITECTURES[job.name].paper_speedup if interval == 2 else None,
        **ours,
        **baseline,
    }


def accelerated(sampler: Sampler, schedule: Schedule) -> Trace:
    """One run with a schedule, entering and leaving included."""
    with accelerate(sampler, schedule) as trace:
        sampler(len(schedule))
    return trace


def outside_fraction(sampler: Sampler, steps: int) -> float:
    """The share of a plain run's time that is not spent in blocks, from one run that waits for the device at every block."""
    entered: list[float] = []
    inside: list[float] = []
    hooks = [
        hook
        for block in blocks_of(sampler.transformer)
        for hook in (
            block.register_forward_pre_hook(lambda *_: entered.append(now())),
            block.register_forward_hook(lambda *_: inside.append(now() - entered[-1])),
        )
    ]
    total = seconds_of(partial(sampler, steps))
    for hook in hooks:
        hook.remove()
    return 1 - sum(inside) / total


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Device memory held at most during a run, weights included; None on the CPU, which does not tell."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def blocks_of(model: Any) -> Any:
    """The list of blocks of one of the architectures."""
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)
