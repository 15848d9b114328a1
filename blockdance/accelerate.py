"""BlockDance itself: store the output of block i on cache steps, start from it on reuse steps (Sec. 3.2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blockdance.adapters import Streams
from blockdance.errors import ScheduleError, SessionError
from blockdance.replay import Recording
from blockdance.schedule import ReuseConfig, Schedule, StepKind, fixed_schedule
from blockdance.session import ModelCall, Part, Session, is_dense_by_gradient
from blockdance.storage import Kept, Latest, StorageRule
from blockdance.trace import OnStep, Trace, traced

PAPER = Latest()


class Reuser(Part):
    """Executes a schedule; holds what the storage rule keeps, by default one block's output per guidance branch."""

    changes_the_run = True

    def __init__(
        self, plan: ReuseConfig | Schedule, trace: Trace, replay: Recording | None, storage: StorageRule = PAPER
    ) -> None:
        self.plan = plan
        self.trace = trace
        self.replay = replay
        self.storage = storage
        self.stored: dict[int, dict[int, list[Kept]]] = {}
        """By guidance branch and block."""
        self.schedule = Schedule.dense(1)
        self._from_step = 0
        """Steps before this one leave nothing behind, and may be replayed."""
        self._call: ModelCall | None = None
        self._entry: list[Any] = []
        self._inputs: Streams = ()

    def begin_run(self, session: Session) -> None:
        self.stored.clear()
        self._session = session
        self.schedule = schedule_for(self.plan, session.num_steps, session.num_blocks)
        looks_back = 0 if self.schedule.first_reuse is None else self.storage.points - 1
        self._from_step = self.schedule.shared_prefix - looks_back
        self._kept_at = [self.schedule.blocks_kept_at(step, self.storage.points) for step in range(session.num_steps)]
        self.trace.schedule = self.schedule
        self.trace.note = self.plan.why_dense(session.num_steps) if isinstance(self.plan, ReuseConfig) else None

    def begin_call(self, call: ModelCall) -> Any:
        if is_dense_by_gradient():
            self.stored.clear()
            return None
        call.kind = self.schedule[call.step]
        if self.replay is not None and call.step < self._from_step:
            output = self.replay.output_for(call)
            call.replayed_seconds = self.replay.trace.steps[call.step].seconds
            call.blocks_evaluated = call.depth
            return output
        return None

    def watches_blocks(self, call: ModelCall) -> bool:
        return call.kind is not StepKind.FULL or self._is_kept(call)

    def before_block(self, call: ModelCall, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams | None:
        block = self._session.blocks[index]
        if call is not self._call:
            self._enter(call, block.inputs(args, kwargs))
        cutoff = self.schedule.cutoff_at(call.step)
        if call.kind is not StepKind.REUSE or index > cutoff:
            return None
        if index == cutoff:
            return self.storage.outputs_at(_position(call), self.stored[call.branch][index], self._inputs)
        return block.inputs(args, kwargs)

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        if index not in self._kept_at[call.step] or not self._is_kept(call):
            return
        inputs = self._inputs if self.storage.wants_inputs else None
        fresh = Kept(_position(call), self._entry, inputs, _cloned(outputs))
        stored = self.stored.setdefault(call.branch, {})
        before = [kept for kept in stored.get(index, []) if kept.entry == fresh.entry]
        earlier = [kept for kept in before if kept.position < fresh.position]
        stored[index] = [*earlier, fresh][-self.storage.points :]
        held = sum(kept.nbytes for blocks in self.stored.values() for several in blocks.values() for kept in several)
        self.trace.cache_bytes = max(self.trace.cache_bytes, held)

    def _enter(self, call: ModelCall, inputs: Streams) -> None:
        """The first block of a call is about to see `inputs`; a reuse step that they do not fit becomes a cache step."""
        self._call, self._entry = call, [(stream.shape, stream.dtype, stream.device) for stream in inputs]
        if self.storage.wants_inputs:
            self._inputs = _cloned(inputs)
        if call.kind is StepKind.REUSE and not self._fits(call):
            call.kind = StepKind.CACHE
        if call.kind is StepKind.CACHE:
            stored = self.stored.get(call.branch, {})
            for block in stored.keys() - self._kept_at[call.step]:
                del stored[block]

    def _is_kept(self, call: ModelCall) -> bool:
        """A cache step, or one of the full steps just before the first that a rule of several points looks back to."""
        looked_back_to = self._from_step <= call.step < self.schedule.shared_prefix
        return call.kind is StepKind.CACHE or (call.kind is StepKind.FULL and looked_back_to)

    def _fits(self, call: ModelCall) -> bool:
        kept = self.stored.get(call.branch, {}).get(self.schedule.cutoff_at(call.step))
        return kept is not None and kept[-1].entry == self._entry


def _position(call: ModelCall) -> float:
    return call.step + call.stage


def _cloned(streams: Streams) -> Streams:
    """A copy of our own, as some blocks work in place."""
    return tuple(stream.clone() for stream in streams)


@contextmanager
def accelerate(
    pipe: Any,
    config: ReuseConfig | Schedule,
    *,
    storage: StorageRule = PAPER,
    replay: Recording | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Trace]:
    """Run the unmodified pipeline inside with BlockDance; leaving restores it exactly, whatever happened inside.

    Args:
        pipe: a diffusers pipeline with a supported transformer; call it inside as usual, any number of times.
        config: a `ReuseConfig`, or a `Schedule` of as many steps as the run will have.
        storage: what a reuse step starts from; by default the last cache step's output, as in the paper. `Extrapolated()`
            continues the last two.
        replay: a baseline from `record`, made with the same call; its outputs stand in for the steps before the
            first reuse, and the result has the same bits as a full run.
        on_step: called with (finished step, number of steps); raise from it to cancel.

    Yields:
        The trace of the last run.

    Raises:
        UnsupportedModelError: no adapter for the transformer, or no scheduler to count steps by.
        ScheduleError: the cutoff does not fit the depth, or the schedule not the number of steps.
        SessionError: the pipeline is accelerated already, or the recording belongs to another model or call.
    """
    trace = Trace(num_blocks=0)
    reuser = Reuser(config, trace, replay, storage)
    with traced(pipe, reuser, trace, on_step) as session:
        if replay is not None and replay.transformer() is not session.transformer:
            raise SessionError("the recording was made with another transformer; record the baseline with this pipeline")
        schedule_for(config, len(config) if isinstance(config, Schedule) else 1, session.num_blocks)
        yield trace


def schedule_for(plan: ReuseConfig | Schedule, num_steps: int, num_blocks: int) -> Schedule:
    """The schedule that `plan` means for a run.

    Raises:
        ScheduleError: the cutoff does not fit the depth, or a given schedule has another number of steps.
    """
    if isinstance(plan, ReuseConfig):
        return fixed_schedule(plan, num_steps, num_blocks)
    plan.check_depth(num_blocks)
    if len(plan) != num_steps:
        raise ScheduleError(f"the schedule has {len(plan)} steps, the run has {num_steps}")
    return plan
