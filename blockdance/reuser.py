"""What reuse does in a run: store the output of block i on cache steps, start from it on reuse steps (Sec. 3.2)."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from torch import Tensor

from blockdance.adapters import Streams, guidance_rows
from blockdance.batch import sample_of, samples_joined
from blockdance.errors import ConfigError, ScheduleError
from blockdance.policy import Moment, Policy, undecided
from blockdance.replay import Recording
from blockdance.schedule import ReuseConfig, Schedule, StepKind, fixed_schedule
from blockdance.session import ModelCall, Part, Session, is_dense_by_gradient
from blockdance.storage import Kept, Latest, StorageRule
from blockdance.trace import Trace

Plan = ReuseConfig | Schedule | Sequence[Schedule] | Policy
"""A setting, a schedule, one for each sample of the batch, or what decides on them in the run."""
PAPER = Latest()


class Reuser(Part):
    """Executes schedules; holds what the storage rule keeps, by default one block's output per guidance branch and sample."""

    changes_the_run = True

    def __init__(self, plan: Plan, trace: Trace, replay: Recording | None, storage: StorageRule = PAPER) -> None:
        self.plan = plan
        self.trace = trace
        self.replay = replay
        self.storage = storage
        self.stored: dict[int, dict[tuple[int, int], list[Kept]]] = {}
        """By guidance branch, and by sample and block."""
        self.schedules = [Schedule.dense(1)]
        """Of each sample; one alone is for the whole batch."""
        self._from_step = 0
        """Steps before this one leave nothing behind, and may be replayed."""
        self._decides_at: int | None = None
        """The step that a policy is to decide before."""
        self._sample_rows = 0
        self._call: ModelCall | None = None
        self._entries: list[list[Any]] = []
        self._inputs: list[Streams] = []

    def begin_run(self, session: Session) -> None:
        self.stored.clear()
        self._session, self._decides_at = session, None
        self.trace.note, self.trace.decisions = None, ()
        if isinstance(self.plan, Policy):
            self._begin_undecided(self.plan, session.num_steps)
            return
        self.trace.note = self.plan.why_dense(session.num_steps) if isinstance(self.plan, ReuseConfig) else None
        self._follow(schedules_for(self.plan, session.num_steps, session.num_blocks))

    def _begin_undecided(self, policy: Policy, num_steps: int) -> None:
        first = policy.decides_at(num_steps)
        if first is None:
            self.trace.note = f"{num_steps} steps are too few for the policy to decide, so every step runs all blocks."
            self._follow([Schedule.dense(num_steps)])
            return
        self._follow([undecided(first, num_steps)])
        self._decides_at, self._from_step = first, max(0, first - self.storage.points)
        for step in range(self._from_step, first):
            self._kept_at[0][step] = frozenset(policy.cutoffs)

    def _follow(self, schedules: Sequence[Schedule]) -> None:
        """These hold from now on; one alone is for the whole batch."""
        self.schedules = list(schedules)
        self.trace.schedule, self.trace.schedules = self.schedules[0], tuple(self.schedules)
        self._from_step = min(
            one.shared_prefix - (0 if one.first_reuse is None else self.storage.points - 1) for one in self.schedules
        )
        points, steps = self.storage.points, range(len(self.schedules[0]))
        self._kept_at = [[one.blocks_kept_at(step, points) for step in steps] for one in self.schedules]

    def begin_call(self, call: ModelCall) -> Any:
        if is_dense_by_gradient():
            self.stored.clear()
            return None
        if call.step == self._decides_at:
            self._decide(call)
        call.kind = self._kind(call)
        if self.replay is not None and call.step < self._from_step:
            output = self.replay.output_for(call)
            call.replayed_seconds = self.replay.trace.steps[call.step].seconds
            call.blocks_evaluated = call.depth
            return output
        return None

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        self._sample_rows = sample_rows

    def _decide(self, call: ModelCall) -> None:
        """Ask the policy, and give every sample what was stored for the batch so far."""
        assert isinstance(self.plan, Policy)
        self._decides_at, session = None, self._session
        decided = self.plan.decide(moment_of(session, call, self._sample_rows))
        schedules = [one.schedule for one in decided]
        for schedule in schedules:
            schedule.check_depth(session.num_blocks)
        self.trace.decisions = tuple(decided)
        self._follow(schedules[:1] if len(set(schedules)) == 1 else schedules)
        self.trace.schedules = tuple(schedules)
        k = len(self.schedules)
        if k > 1:
            for stored in self.stored.values():
                whole = {block: several for (_, block), several in stored.items()}
                stored.clear()
                for sample, (block, several) in product(range(k), whole.items()):
                    stored[sample, block] = [part_of(kept, sample, k, call.rows) for kept in several]

    def _kind(self, call: ModelCall) -> StepKind:
        """What the step is for the samples of a call; where they differ it is a cache step."""
        kinds = {self.schedules[sample][call.step] for sample in self._samples(call)}
        return kinds.pop() if len(kinds) == 1 else StepKind.CACHE

    def _samples(self, call: ModelCall) -> Sequence[int]:
        return range(len(self.schedules)) if call.samples is None else call.samples

    def parts_of(self, call: ModelCall) -> Sequence[Sequence[int]]:
        """Samples that skip as many blocks go together."""
        if len(self.schedules) == 1 or is_dense_by_gradient():
            return ()
        if call.rows % len(self.schedules):
            raise ScheduleError(f"the batch has {call.rows} rows, which do not go into {len(self.schedules)} schedules")
        alike: dict[int, list[int]] = {}
        for sample, schedule in enumerate(self.schedules):
            alike.setdefault(schedule.blocks_at(call.step, self._session.num_blocks), []).append(sample)
        return list(alike.values()) if len(alike) > 1 else ()

    def begin_part(self, call: ModelCall) -> None:
        call.kind = self._kind(call)

    def watches_blocks(self, call: ModelCall) -> bool:
        return call.kind is not StepKind.FULL or any(self._is_kept(call, sample) for sample in self._samples(call))

    def before_block(self, call: ModelCall, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams | None:
        block = self._session.blocks[index]
        if call is not self._call:
            self._enter(call, block.inputs(args, kwargs))
        samples = self._samples(call)
        cutoff = self.schedules[samples[0]].cutoff_at(call.step)
        if call.kind is not StepKind.REUSE or index > cutoff:
            return None
        if index < cutoff:
            return block.inputs(args, kwargs)
        starts = [
            self.storage.outputs_at(_position(call), self.stored[call.branch][sample, index], inputs)
            for sample, inputs in zip(samples, self._inputs, strict=True)
        ]
        return tuple(samples_joined(streams, call.rows) for streams in zip(*starts, strict=True))

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        samples = self._samples(call)
        for place, sample in enumerate(samples):
            if index not in self._kept_at[sample][call.step] or not self._is_kept(call, sample):
                continue
            inputs = self._inputs[place] if self.storage.wants_inputs else None
            ours = tuple(sample_of(stream, place, len(samples), call.rows).clone() for stream in outputs)
            fresh = Kept(_position(call), self._entries[place], inputs, ours)
            stored = self.stored.setdefault(call.branch, {})
            before = [kept for kept in stored.get((sample, index), []) if kept.entry == fresh.entry]
            earlier = [kept for kept in before if kept.position < fresh.position]
            stored[sample, index] = [*earlier, fresh][-self.storage.points :]
        held = sum(kept.nbytes for blocks in self.stored.values() for several in blocks.values() for kept in several)
        self.trace.cache_bytes = max(self.trace.cache_bytes, held)

    def _enter(self, call: ModelCall, inputs: Streams) -> None:
        """The first block of a call is about to see `inputs`; a reuse step that they do not fit becomes a cache step."""
        samples, k = self._samples(call), len(self._samples(call))
        parts = [[sample_of(stream, place, k, call.rows) for stream in inputs] for place in range(k)]
        self._call = call
        self._entries = [[(tuple(stream.shape), stream.dtype, stream.device) for stream in part] for part in parts]
        wanted = self.storage.wants_inputs
        self._inputs = [tuple(stream.clone() for stream in part) if wanted else () for part in parts]
        if call.kind is StepKind.REUSE and not all(map(self._fits, [call] * k, samples, self._entries)):
            call.kind = StepKind.CACHE
        if call.kind is StepKind.CACHE:
            stored = self.stored.get(call.branch, {})
            for sample, block in [place for place in stored if place[0] in samples]:
                if self._is_kept(call, sample) and block not in self._kept_at[sample][call.step]:
                    del stored[sample, block]

    def _is_kept(self, call: ModelCall, sample: int) -> bool:
        """On a cache step, or one of the full steps just before the first that a rule of several points looks back to."""
        planned = self.schedules[sample][call.step]
        looked_back_to = self._from_step <= call.step < self.schedules[sample].shared_prefix
        return call.kind is not StepKind.REUSE and (planned is not StepKind.FULL or looked_back_to)

    def _fits(self, call: ModelCall, sample: int, entry: list[Any]) -> bool:
        kept = self.stored.get(call.branch, {}).get((sample, self.schedules[sample].cutoff_at(call.step)))
        return kept is not None and kept[-1].entry == entry


def moment_of(session: Session, call: ModelCall, sample_rows: int) -> Moment:
    """What a policy sees of a call, which is the first of its step; `sample_rows` are those of the latent that is stepped."""
    named = session.named(call.args, call.kwargs)
    rows = guidance_rows(session.transformer, session.stack, call.branch, named, call.rows, sample_rows)["conditional"]
    text, mask = [None if one is None else one[rows] for one in words_of(named)]
    return Moment(named[session.latent_name][rows], text, mask, session.num_steps)


def words_of(named: dict[str, Any]) -> tuple[Any, Any]:
    """The text among a transformer's arguments, (b, tokens, d), and its mask, as diffusers or as Open-Sora names them.

    Open-Sora's text is (b, 1, tokens, d), and with guidance its mask has the conditional rows alone, which come first. What
    else is called `y`, as one vector for all words, is not seen.
    """
    y = named.get("y")
    if isinstance(y, Tensor) and y.is_floating_point() and y.ndim == 4:
        return y.flatten(1, 2), named.get("mask")
    return named.get("encoder_hidden_states"), named.get("encoder_attention_mask")


def part_of(kept: Kept, sample: int, num_samples: int, rows: int) -> Kept:
    """What was kept of a whole call of `rows` rows, of one sample."""

    def part(streams: Streams) -> Streams:
        return tuple(sample_of(stream, sample, num_samples, rows).clone() for stream in streams)

    outputs, inputs = part(kept.outputs), None if kept.inputs is None else part(kept.inputs)
    entry = [((shape[0] // num_samples, *shape[1:]), *more) for shape, *more in kept.entry]
    return Kept(kept.position, entry, inputs, outputs)


def _position(call: ModelCall) -> float:
    return call.step + call.stage


def check_kind(plan: object) -> None:
    """Raise ConfigError unless it is a plan of some kind."""
    is_list = isinstance(plan, Sequence) and all(isinstance(one, Schedule) for one in plan)
    if isinstance(plan, type) or not (is_list or isinstance(plan, (ReuseConfig, Schedule, Policy))):
        raise ConfigError(f"config must be a ReuseConfig, a Schedule, a list of Schedules or a policy, got {plan!r}")


def check_plan(plan: Plan, session: Session) -> None:
    """Raise what can be known to be wrong before a run begins: PolicyError, or ScheduleError."""
    if isinstance(plan, Policy):
        plan.check(session.transformer)
    elif isinstance(plan, ReuseConfig):
        schedules_for(plan, 1, session.num_blocks)
    else:
        schedules_for(plan, len(listed(plan)[0]) if listed(plan) else 1, session.num_blocks)


def listed(plan: Schedule | Sequence[Schedule]) -> list[Schedule]:
    return [plan] if isinstance(plan, Schedule) else list(plan)


def schedules_for(plan: ReuseConfig | Schedule | Sequence[Schedule], num_steps: int, num_blocks: int) -> list[Schedule]:
    """The schedules that a plan means for a run, one for the whole batch, or one for each sample.

    Raises:
        ScheduleError: none, the cutoff does not fit the depth, or a given schedule has another number of steps.
    """
    if isinstance(plan, ReuseConfig):
        return [fixed_schedule(plan, num_steps, num_blocks)]
    schedules = listed(plan)
    if not schedules:
        raise ScheduleError("a batch needs one schedule for each sample, got none")
    for schedule in schedules:
        schedule.check_depth(num_blocks)
        if len(schedule) != num_steps:
            raise ScheduleError(f"the schedule has {len(schedule)} steps, the run has {num_steps}")
    return schedules[:1] if len(set(schedules)) == 1 else schedules
