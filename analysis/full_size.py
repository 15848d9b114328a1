"""What BlockDance saves and costs at full size, with random weights, on the GPU if there is one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from analysis.architectures import ARCHITECTURES, Sampler, sampler_for, with_random_weights
from analysis.experiment import MAX_STEPS, check_range
from analysis.memory import peak_bytes
from analysis.records import RESULTS, BenchError, Record, commit, provenance, read_records, write_records
from analysis.speedup import MEASURED, speedup_of
from analysis.stopwatch import interleaved, spread
from blockdance import MIN_STEPS, Schedule, Trace, accelerate, fixed_schedule
from blockdance.presets import PRESETS

FULL_SIZE_RESULTS = RESULTS.with_name("full_size.jsonl")
FORWARDS = {
    "eager": "eager",
    "blocks": "blocks compiled",
    "whole": "transformer compiled as a whole",
    "graphs": "transformer compiled as a whole, with CUDA graphs",
}
"""How the transformer runs, and how a table says it."""
WHOLE: dict[str, dict[str, Any]] = {"whole": {}, "graphs": {"mode": "reduce-overhead"}}
"""Of those that compile the whole forward, the options of `torch.compile`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL_SIZE_REPEATS = 3
WARM_UP_STEPS = MIN_STEPS
MAX_BATCH = 64
KEY = ("architecture", "batch", "reuse_interval", "steps", "dtype", "device")
"""What tells one measurement from another, beside `forward_of` it; it is not made again while the results file has it from the
same commit."""

Run = int | Literal["baseline", "outside"]
"""A timed run: the paper's N, the plain sampler, or the plain sampler with its blocks left out."""


@dataclass(frozen=True)
class Job:
    """What `bench --model` is asked for.

    Raises:
        RequestError: a value outside its range.
        BenchError: no such architecture, dtype or forward.
    """

    name: str
    """A key of ARCHITECTURES."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Samples drawn together; guidance doubles the rows."""
    intervals: tuple[int, ...] = (2, 3, 4)
    steps: int | None = None
    """None: the preset's."""
    repeats: int = FULL_SIZE_REPEATS
    dtype: str | None = None
    """A key of DTYPES; None: bfloat16 on the GPU, float32 on the CPU."""
    forward: str = "eager"
    """A key of FORWARDS."""

    def __post_init__(self) -> None:
        defaults(self.name)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BenchError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.forward not in FORWARDS:
            raise BenchError(f"forward must be one of {', '.join(FORWARDS)}, got {self.forward!r}")
        for batch in self.batches:
            check_range("batch", batch, 1, MAX_BATCH, int)
        for interval in self.intervals:
            check_range("intervals", interval, 1, MAX_STEPS, int)
        if self.steps is not None:
            check_range("steps", self.steps, MIN_STEPS, MAX_STEPS, int)
        check_range("repeats", self.repeats, 1, 1000, int)

    @property
    def run_steps(self) -> int:
        """Sampling steps of every run."""
        return self.steps or PRESETS[self.name].steps

    @property
    def run_dtype(self) -> str:
        """A key of DTYPES."""
        return self.dtype or ("bfloat16" if device_here().type == "cuda" else "float32")

    def schedule(self, interval: int, num_blocks: int) -> Schedule:
        """The paper's, with another N."""
        config = PRESETS[self.name].config
        cutoff = min(config.cutoff_block or 0, num_blocks - 2)
        return fixed_schedule(replace(config, reuse_interval=interval, cutoff_block=cutoff), self.run_steps, num_blocks)

    def key(self, batch: int, interval: int) -> tuple[Any, ...]:
        """Of the record that measures this."""
        return self.name, batch, interval, self.run_steps, self.run_dtype, device_here().type, self.forward


def defaults(name: str) -> tuple[tuple[int, ...], int | None]:
    """Batch sizes and steps where none are asked for: everything on a GPU, a reduced set on a CPU.

    Raises:
        BenchError: no such architecture.
    """
    if name not in ARCHITECTURES:
        raise BenchError(f"model must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if device_here().type == "cuda":
        return (1, 4, 16), None
    return (1,), PRESETS[name].steps // 2  # which keeps the ideal as it is


def run_full_size(job: Job, out: Path) -> list[Record]:
    """Measure what the results file does not have from this commit, and write it after every batch size.

    Returns:
        All records of the file.

    Raises:
        BenchError: the results file cannot be read, or a batch does not fit in the GPU's memory.
    """
    records = read_records(out) if out.exists() else []
    missing = missing_intervals(job, records)
    if missing:
        model = with_random_weights(ARCHITECTURES[job.name].build, device_here(), DTYPES[job.run_dtype])
        compile_for(job.forward, model)
    for batch, intervals in missing.items():
        try:
            found = measure(job, sampler_for(job.name, model, batch), batch, intervals)
        except torch.OutOfMemoryError as error:
            raise BenchError(f"batch must fit in the GPU's memory, which {job.name} with {batch} does not") from error
        replaced = {key_of(record) for record in found}
        records = [record for record in records if key_of(record) not in replaced] + found
        write_records(out, records)
    return records


def missing_intervals(job: Job, records: list[Record]) -> dict[int, list[int]]:
    """For every batch size the intervals that no record of this commit measures; what is asked for twice counts once."""
    here = commit()
    known = {key_of(record) for record in records if record["commit"] == here}
    missing = {batch: [n for n in dict.fromkeys(job.intervals) if job.key(batch, n) not in known] for batch in job.batches}
    return {batch: intervals for batch, intervals in missing.items() if intervals}


def measure(job: Job, sampler: Sampler, batch: int, intervals: list[int]) -> list[Record]:
    """The baseline and every interval in the same rounds."""
    steps, num_blocks = job.run_steps, len(blocks_of(sampler.transformer))
    schedules = {interval: job.schedule(interval, num_blocks) for interval in intervals}
    traces: dict[int, Trace] = {}

    def ours(interval: int) -> None:
        traces[interval] = accelerated(sampler, schedules[interval], job.forward)

    warm_up(job, sampler, num_blocks)
    plain = partial(sampler, steps)
    runs: dict[Run, Callable[[], object]] = {"baseline": plain, **{interval: partial(ours, interval) for interval in intervals}}
    with_outside: dict[Run, Callable[[], object]] = runs | {"outside": partial(outside, sampler, steps)}
    seconds = interleaved(with_outside, job.repeats, f"{job.name}, batch {batch}")
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    common = circumstances_of(job, sampler, batch) | {"baseline_peak_bytes": peaks["baseline"]}
    return [
        common | {"peak_bytes": peaks[interval]} | speedup(job, interval, traces[interval], seconds) for interval in intervals
    ]


def warm_up(job: Job, sampler: Sampler, num_blocks: int) -> None:
    """A short run of each kind, so that no timed one pays for what happens once.

    Compiled blocks have four graphs for a batch size and dynamo keeps eight, so those of the last batch size are dropped.
    """
    if job.forward != "eager":
        torch.compiler.reset()
    sampler(WARM_UP_STEPS)
    accelerated(sampler, replace(job, steps=WARM_UP_STEPS).schedule(2, num_blocks), job.forward)
    outside(sampler, WARM_UP_STEPS)


def circumstances_of(job: Job, sampler: Sampler, batch: int) -> Record:
    """What all records of a batch size have in common."""
    return provenance() | {
        "bench": "full_size",
        "architecture": job.name,
        "num_blocks": len(blocks_of(sampler.transformer)),
        "parameters": sum(weight.numel() for weight in sampler.transformer.parameters()),
        "batch": batch,
        "steps": job.run_steps,
        "preset_steps": PRESETS[job.name].steps,
        "dtype": job.run_dtype,
        "device": device_here().type,
        "forward": job.forward,
        "repeats": job.repeats,
    }


def speedup(job: Job, interval: int, trace: Trace, seconds: Mapping[Run, list[float]]) -> Record:
    """Measured and ideal, of one interval."""
    measured = speedup_of(seconds["baseline"], seconds[interval])
    outside_fraction = float(np.median(seconds["outside"]) / np.median(seconds["baseline"]))
    with_outside = ideal_with_outside(trace.block_evaluations / trace.baseline_block_evaluations, outside_fraction)
    assert trace.schedule is not None
    return {
        "reuse_interval": interval,
        "cutoff_block": trace.schedule.cutoff_block,
        "schedule": str(trace.schedule),
        **measured,
        "speedup_ideal": trace.speedup_ideal,
        "fraction_of_ideal": measured[MEASURED] / trace.speedup_ideal,
        "speedup_ideal_with_outside": with_outside,
        "fraction_of_ideal_with_outside": measured[MEASURED] / with_outside,
        "block_evaluations": trace.block_evaluations,
        "baseline_block_evaluations": trace.baseline_block_evaluations,
        "cache_bytes": trace.cache_bytes,
        "paper_speedup": ARCHITECTURES[job.name].paper_speedup if interval == 2 else None,
        **spread("seconds", seconds[interval]),
        **spread("baseline_seconds", seconds["baseline"]),
        **spread("outside_seconds", seconds["outside"]),
        "outside_fraction": outside_fraction,
    }


def ideal_with_outside(evaluated: float, outside_fraction: float) -> float:
    """The ideal speedup if what is outside the blocks, a share of the plain run's time, is not saved.

    Args:
        evaluated: block evaluations over those of the plain run, in (0, 1].
        outside_fraction: in [0, 1]; 0 gives the ideal that counts blocks alone.
    """
    return 1 / (outside_fraction + (1 - outside_fraction) * evaluated)


def accelerated(sampler: Sampler, schedule: Schedule, forward: str) -> Trace:
    """One run with a schedule, entering and leaving included."""
    with accelerate(sampler, schedule, compiled=WHOLE.get(forward)) as trace:
        sampler(len(schedule))
    return trace


def outside(sampler: Sampler, steps: int) -> None:
    """A plain run in which the blocks do nothing: embeddings, output layer, guidance and scheduler remain."""
    with without_blocks(sampler.transformer):
        sampler(steps)


@contextmanager
def without_blocks(model: Any) -> Iterator[None]:
    """Blocks put out what they are given; their classes are swapped, as DiT reads an embedding off its first block."""
    blocks = list(blocks_of(model))
    classes = [type(block) for block in blocks]
    idle = {cls: idle_class(cls) for cls in classes}
    for block, cls in zip(blocks, classes, strict=True):
        block.__class__ = idle[cls]
    try:
        yield
    finally:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = cls


def idle_class(cls: type) -> type:
    """A block whose call does nothing, also if it is compiled."""
    return type(cls.__name__, (cls,), {"__call__": lambda block, hidden, *_, **__: hidden})


def blocks_of(model: Any) -> Any:
    """The list of blocks of one of the architectures."""
    return model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks


def compile_for(forward: str, model: Any) -> None:
    """Have the transformer run as a key of FORWARDS says; `torch.compile` works in place."""
    if forward == "blocks":
        for block in blocks_of(model):
            block.compile(fullgraph=True)
    elif forward in WHOLE:
        model.compile(**WHOLE[forward])


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def key_of(record: Record) -> tuple[Any, ...]:
    return *(record.get(name) for name in KEY), forward_of(record)


def forward_of(record: Record) -> str:
    """How the transformer ran: a key of FORWARDS; lines of before 2026-11-26 say whether blocks were compiled."""
    forward: str = record["forward"] if "forward" in record else "blocks" if record["compiled"] else "eager"
    return forward
