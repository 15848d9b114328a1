"""What really ran: kind, block evaluations and seconds of every step."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from blockdance.part import ModelCall, Part, Run
from blockdance.policy import Decision
from blockdance.schedule import Schedule, StepKind
from blockdance.scheduled import joined
from blockdance.session import Session

OnStep = Callable[[int, int], None]
"""Called with (finished step, number of steps) after each step; raising from it cancels the run. On a GPU the step may not have
ended there yet."""
Mark = float | torch.cuda.Event
"""A moment: seconds, or an event of a GPU, whose time is read when somebody asks."""


def mark(device: torch.device | None) -> Mark:
    """Now, in the order of work of a GPU, or by the clock."""
    if device is None:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """From one mark to the next; waits for the second, if it is an event."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float), "both marks of a step are of one kind"
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class StepRecord:
    """One finished step."""

    kind: StepKind
    """What the step did, which is what the schedule said unless a stored tensor did not fit."""
    blocks_evaluated: float
    """Blocks that ran, over all calls of the step (a replayed step counts what ran when it was recorded). Where samples of a
    batch differ, the mean over them, and a whole number otherwise."""
    blocks_total: int
    """Blocks the plain pipeline runs in this step, over all its calls."""
    seconds: float
    """Wall time of the whole step, scheduler included; of the recorded run for a replayed step."""
    replayed: bool
    spent_seconds: float
    """Wall time actually spent now; less than `seconds` for a replayed step."""


@dataclass(slots=True)
class FinishedStep:
    """A step whose seconds may still be on the device."""

    kind: StepKind
    blocks_evaluated: float
    blocks_total: int
    replayed_seconds: float | None
    begin: Mark
    end: Mark

    def record(self) -> StepRecord:
        """With its seconds; waits for the device until the step has ended there."""
        spent = seconds_between(self.begin, self.end)
        replayed = self.replayed_seconds is not None
        seconds = spent if self.replayed_seconds is None else self.replayed_seconds
        return StepRecord(self.kind, self.blocks_evaluated, self.blocks_total, seconds, replayed, spent)


@dataclass
class Trace:
    """The record of the last run inside `accelerate` or `record`; complete when the run is."""

    num_blocks: int
    schedule: Schedule | None = None
    """What was planned; None before a run has begun."""
    schedules: tuple[Schedule, ...] = ()
    """Of each sample, if they were given or decided one by one; `schedule` is the first of them."""
    decisions: tuple[Decision, ...] = ()
    """What a policy decided in this run, for each sample."""
    note: str | None = None
    """Why the run reuses nothing, as a sentence, if it was asked to and did not."""
    cache_bytes: int = 0
    """Bytes held by stored block outputs at most: one tensor per guidance branch."""
    _finished: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    """`StepRecord`s, or `FinishedStep`s until somebody asks for their seconds."""
    steps: list[StepRecord] = field(default_factory=list)
    """The finished steps; on a GPU, to read this waits until they have ended there, and nothing else in a run does."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_finished": list(self.steps)}

    @property
    def ran(self) -> tuple[StepKind, ...]:
        """What the finished steps did."""
        return tuple(step.kind for step in self._finished)

    @property
    def seconds(self) -> float:
        """Wall time of the sampling loop; replayed steps count with the seconds they took when recorded."""
        return sum(step.seconds for step in self.steps)

    @property
    def spent_seconds(self) -> float:
        """Wall time actually spent in the sampling loop."""
        return sum(step.spent_seconds for step in self.steps)

    @property
    def block_evaluations(self) -> float:
        """Blocks run in total."""
        return sum(step.blocks_evaluated for step in self._finished)

    @property
    def baseline_block_evaluations(self) -> int:
        """Blocks the plain pipeline runs for the same steps."""
        return sum(step.blocks_total for step in self._finished)

    @property
    def kinds(self) -> str:
        """What ran, written like a schedule: `ffffcrcrf`."""
        return "".join(kind.value for kind in self.ran)

    @property
    def speedup_ideal(self) -> float:
        """Block evaluations of the plain pipeline over ours; 1.0 before anything ran."""
        return self.baseline_block_evaluations / self.block_evaluations if self.block_evaluations else 1.0

    def speedup_over(self, baseline: "Trace") -> float:
        """Measured: the baseline's seconds over ours."""
        return baseline.seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schedule": str(self.schedule) if self.schedule else None,
            "cutoff_block": self.schedule.cutoff_block if self.schedule else None,
            "num_blocks": self.num_blocks,
            "note": self.note,
            "seconds": self.seconds,
            "block_evaluations": self.block_evaluations,
            "baseline_block_evaluations": self.baseline_block_evaluations,
            "speedup_ideal": self.speedup_ideal,
            "cache_bytes": self.cache_bytes,
            **({"schedules": [str(one) for one in self.schedules]} if len(self.schedules) > 1 else {}),
            "steps": [asdict(step) | {"kind": step.kind.value} for step in self.steps],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict())


def _steps(trace: Trace) -> list[StepRecord]:
    trace._finished[:] = [one if isinstance(one, StepRecord) else one.record() for one in trace._finished]
    return trace._finished


def _set_steps(trace: Trace, steps: list[StepRecord]) -> None:
    trace._finished = steps


Trace.steps = property(_steps, _set_steps, doc="The finished steps.")  # type: ignore[assignment, method-assign]


class Tracer(Part):
    """Fills a trace while a run goes on; the host never waits for the device for it."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._last: Mark = 0.0

    def begin_run(self, run: Run) -> None:
        self.resize_run(run)
        self.trace._finished.clear()
        self.trace.cache_bytes = 0
        self._devices = [next(denoiser.transformer.parameters()).device for denoiser in run.denoisers]
        self._last = self._mark()

    def resize_run(self, run: Run) -> None:
        self.trace.num_blocks = run.num_blocks

    def _mark(self) -> Mark:
        return mark(next((device for device in self._devices if device.type == "cuda"), None))

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        now = self._mark()
        kind, total, replayed = StepKind.FULL, 0, None
        evaluated: float = 0
        for place, call in enumerate(calls):
            kind = call.kind if not place or call.kind is kind else StepKind.CACHE
            evaluated, total = evaluated + call.blocks_evaluated, total + call.depth
            replayed = replayed if call.replayed_seconds is None else call.replayed_seconds
        self.trace._finished.append(FinishedStep(kind, evaluated, total, replayed, self._last, now))
        self._last = now


class StepTeller(Part):
    """Tells a caller about every finished step."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.num_steps = 0

    def begin_run(self, run: Run) -> None:
        self.num_steps = run.num_steps

    resize_run = begin_run

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        self.on_step(step, self.num_steps)


@contextmanager
def traced(pipe: Any, part: Part, trace: Trace, on_step: OnStep | None) -> Iterator[Session]:
    """Let `part` take part in the pipeline's session, fill `trace`, and tell `on_step` about every step."""
    with ExitStack() as stack:
        session = stack.enter_context(joined(pipe, part))
        trace.num_blocks = session.num_blocks
        stack.enter_context(joined(pipe, Tracer(trace)))
        if on_step is not None:
            stack.enter_context(joined(pipe, StepTeller(on_step)))
        yield session
