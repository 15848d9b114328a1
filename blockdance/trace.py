"""What really ran: kind, block evaluations and seconds of every step."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from blockdance.policy import Decision
from blockdance.schedule import Schedule, StepKind
from blockdance.scheduled import joined
from blockdance.session import ModelCall, Part, Session

OnStep = Callable[[int, int], None]
"""Called with (finished step, number of steps) after each step; raising from it cancels the run."""


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
    """Why the run reuses nothing, as a sentence, if it was asked to and cannot."""
    cache_bytes: int = 0
    """Bytes held by stored block outputs at most: one tensor per guidance branch."""
    steps: list[StepRecord] = field(default_factory=list)

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
        return sum(step.blocks_evaluated for step in self.steps)

    @property
    def baseline_block_evaluations(self) -> int:
        """Blocks the plain pipeline runs for the same steps."""
        return sum(step.blocks_total for step in self.steps)

    @property
    def kinds(self) -> str:
        """What ran, written like a schedule: `ffffcrcrf`."""
        return "".join(step.kind.value for step in self.steps)

    @property
    def speedup_ideal(self) -> float:
        """Block evaluations of the plain pipeline over ours; 1.0 before anything ran."""
        return self.baseline_block_evaluations / self.block_evaluations if self.steps else 1.0

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


class Tracer(Part):
    """Fills a trace while a run goes on."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._last = 0.0

    def begin_run(self, session: Session) -> None:
        self.trace.steps.clear()
        self.trace.cache_bytes = 0
        self._on_device = next(session.transformer.parameters()).is_cuda
        self._last = self._now()

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        now = self._now()
        kinds = {call.kind for call in calls}
        replayed = [call.replayed_seconds for call in calls if call.replayed_seconds is not None]
        self.trace.steps.append(
            StepRecord(
                kind=kinds.pop() if len(kinds) == 1 else StepKind.CACHE,
                blocks_evaluated=sum(call.blocks_evaluated for call in calls),
                blocks_total=sum(call.depth for call in calls),
                seconds=replayed[0] if replayed else now - self._last,
                replayed=bool(replayed),
                spent_seconds=now - self._last,
            )
        )
        self._last = now

    def _now(self) -> float:
        """Seconds; waits for the device first, so that a step's seconds are its own."""
        if self._on_device:
            torch.cuda.synchronize()
        return time.perf_counter()


class StepTeller(Part):
    """Tells a caller about every finished step."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.num_steps = 0

    def begin_run(self, session: Session) -> None:
        self.num_steps = session.num_steps

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
