"""What reuse does in a run: store the output of block i on cache steps, start from it on reuse steps (Sec. 3.2)."""

import warnings
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from blockdance.adapters import Streams
from blockdance.agenda import Agenda, check_length
from blockdance.batch import sample_of, samples_joined
from blockdance.denoiser import Denoiser
from blockdance.errors import BlockDanceWarning, ConfigError, PolicyError, ScheduleError
from blockdance.kept import KeptOutputs
from blockdance.modelstate import AdapterWatch
from blockdance.moment import moment_of
from blockdance.part import ModelCall, Part, Run
from blockdance.policy import Policy, undecided
from blockdance.replay import Recording
from blockdance.schedule import ReuseConfig, Schedule, StepKind, fixed_schedule
from blockdance.session import Session, is_dense_by_gradient
from blockdance.storage import PAPER, Kept, StorageRule, stored_by
from blockdance.trace import Trace

Plan = ReuseConfig | Schedule | Sequence[Schedule] | Policy
"""A setting, a schedule, one for each sample of the batch, or what decides on them in the run."""
GRADIENTS = "Gradients are on, so every step ran all blocks; call the pipeline under torch.no_grad()."
NOTHING_FITS = (
    "No call found what the last cache step had stored for its branch, as its conditioning, its shape or the model's adapters "
    "changed with every step, so every step ran all blocks."
)
NO_CALLS = "The transformer was not called by the loop that steps the scheduler, so its calls ran all blocks."
NO_RUN = "No run was begun inside: the pipeline's scheduler was never set to timesteps, so nothing was reused."
ONE_BLOCK = "The transformer has one block, and reuse needs two, so every step runs all blocks."


@dataclass
class Entered:
    """What a call's first block sees, sample by sample."""

    entries: list[list[Hashable]]
    """Everything that what is stored must have been made with: adapters, and the shape, dtype and device of each stream."""
    inputs: list[Streams]
    """If the storage rule wants them."""
    starts: list[list[Kept]]
    """What a reuse step starts from; of a step that runs all blocks empty."""


class Reuser(Part):
    """Executes schedules; holds what the storage rule keeps, by default one block's output per guidance branch and sample."""

    changes_the_run = True

    def __init__(self, plan: Plan, trace: Trace, replay: Recording | None, storage: StorageRule = PAPER) -> None:
        self.plan = plan
        self.trace = trace
        self.replay = replay
        self.storage = storage
        self.stored = KeptOutputs(storage.points)
        self._agendas: list[Agenda] = []
        """Of each denoiser."""
        self._adapters: list[AdapterWatch] = []
        self._decides_at: int | None = None
        """The step that a policy is to decide before."""
        self._sample_rows = 0
        self._is_planned = False
        self._had_gradients = False
        self._has_warned = False
        self._entered = Entered([], [], [])
        self._reused = self._missed = 0
        """Calls that were to reuse: those that did, and those that ran all blocks instead."""

    # The run

    def begin_run(self, run: Run) -> None:
        self.stored.clear()
        self._had_gradients = False
        self._adapters = [AdapterWatch(denoiser.transformer) for denoiser in run.denoisers]
        self.trace.decisions = ()
        self.resize_run(run)
        if self.replay is not None:
            self.replay.check_models(run.denoisers)

    def resize_run(self, run: Run) -> None:
        self._run, self._decides_at, self.unfit, self.trace.note = run, None, None, None
        if run.num_blocks < 2:
            self._is_planned, self.trace.note = False, ONE_BLOCK
            self._follow([Schedule.dense(run.num_steps)])
        elif isinstance(self.plan, Policy):
            self._begin_undecided(self.plan, run.num_steps)
        else:
            self._begin_planned(self.plan, run)

    def _begin_planned(self, plan: ReuseConfig | Schedule | Sequence[Schedule], run: Run) -> None:
        if isinstance(plan, ReuseConfig):
            self.trace.note = plan.why_dense(run.num_steps)
            self._is_planned = plan.reuse_interval > 1
        try:
            plans = zip(plans_for(plan, len(run.denoisers)), run.denoisers, strict=True)
            of_each = [schedules_for(one, run.num_steps, depth_for(one, denoiser, run.num_blocks)) for one, denoiser in plans]
        except ScheduleError as error:
            self.unfit, of_each = error, [[Schedule.dense(run.num_steps)]] * len(run.denoisers)
        self._follow(*of_each)
        if not isinstance(plan, ReuseConfig):
            self._is_planned = any(agenda.plans_reuse() for agenda in self._agendas)

    def _begin_undecided(self, policy: Policy, num_steps: int) -> None:
        first = policy.decides_at(num_steps)
        self._is_planned = True
        if first is None:
            self.trace.note = f"{num_steps} steps are too few for the policy to decide, so every step runs all blocks."
            self._follow([Schedule.dense(num_steps)])
            return
        self._follow([undecided(first, num_steps)])
        self._decides_at = first
        for agenda in self._agendas:
            agenda.keep(max(0, first - self.storage.points), first, policy.cutoffs)

    def _follow(self, *of_each: Sequence[Schedule]) -> None:
        """These hold from now on, for each denoiser; given once, they are for all."""
        denoisers = self._run.denoisers
        lists = of_each if len(of_each) == len(denoisers) else of_each * len(denoisers)
        self._agendas = [
            Agenda(one, denoiser.num_blocks, self.storage.points) for one, denoiser in zip(lists, denoisers, strict=True)
        ]
        self.trace.schedules = tuple(lists[0])
        self.trace.schedule = self.trace.schedules[0]

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        self._sample_rows = sample_rows

    def end_run(self, run: Run) -> None:
        """Let go of what is stored; say why nothing was reused, if it was asked for."""
        self.stored.clear()
        self._entered = Entered([], [], [])
        if not self._is_planned or not run.steps_done or StepKind.REUSE in self.trace.ran:
            return
        if self.trace.note is None:
            self.trace.note = self._why_nothing(run)
        self.warn(self.trace.note)

    def _why_nothing(self, run: Run) -> str:
        if self._had_gradients:
            return GRADIENTS
        reuse = min((one.first_reuse for one in self.trace.schedules if one.first_reuse is not None), default=None)
        if self._decides_at is not None or (reuse is not None and run.steps_done <= reuse):
            return f"The run ended after {run.steps_done} of {run.num_steps} steps, before any step that reuses."
        if reuse is None:
            return "The policy decided that every step runs all blocks."
        return NOTHING_FITS if self.trace.block_evaluations else NO_CALLS

    def leave(self) -> None:
        """Nothing runs any more; say so if nothing ever did."""
        if self.trace.schedule is None:
            self.trace.note = NO_RUN
            self.warn(NO_RUN)

    def tell_misses(self) -> None:
        """Where runs have no known end: say so if nothing was reused of what was asked for until now."""
        if not self._reused and (self._missed or self._had_gradients):
            self.warn(GRADIENTS if self._had_gradients else NOTHING_FITS)

    def warn(self, note: str) -> None:
        """Once."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(note, BlockDanceWarning, stacklevel=2)

    def drop_branch(self, expert: int, branch: int) -> None:
        self.stored.drop((expert, branch))

    # A call

    def begin_call(self, call: ModelCall) -> Any:
        if is_dense_by_gradient():
            self._had_gradients = True
            self.stored.clear()
            return None
        if call.step == self._decides_at:
            self._decide(call)
        agenda = self._agendas[call.expert]
        call.kind = agenda.kind(call.step, samples_of(call, agenda))
        if self.replay is not None and call.step < min(one.from_step for one in self._agendas):
            output = self.replay.output_for(call)
            call.replayed_seconds = self.replay.trace.steps[call.step].seconds
            call.blocks_evaluated = call.depth
            return output
        return None

    def _decide(self, call: ModelCall) -> None:
        """Ask the policy, and give every sample what was stored for the batch so far."""
        assert isinstance(self.plan, Policy)
        self._decides_at = None
        decided = self.plan.decide(moment_of(call, self._sample_rows, self._run.num_steps))
        schedules = [one.schedule for one in decided]
        for schedule in schedules:
            schedule.check_depth(call.denoiser.num_blocks)
        self.trace.decisions = tuple(decided)
        self._follow(alike(schedules))
        self.trace.schedules = tuple(schedules)
        if len(alike(schedules)) > 1:
            self.stored.split(len(schedules), call.rows)

    def parts_of(self, call: ModelCall) -> Sequence[Sequence[int]]:
        """Samples that skip as many blocks go together."""
        agenda = self._agendas[call.expert]
        if len(agenda.samples) == 1 or is_dense_by_gradient():
            return ()
        if call.rows % len(agenda.samples):
            raise ScheduleError(f"the batch has {call.rows} rows, which do not go into {len(agenda.samples)} schedules")
        alike: dict[int, list[int]] = {}
        for sample in agenda.samples:
            alike.setdefault(agenda.blocks_run(call.step, sample), []).append(sample)
        return list(alike.values()) if len(alike) > 1 else ()

    def begin_part(self, call: ModelCall) -> None:
        agenda = self._agendas[call.expert]
        call.kind = agenda.kind(call.step, samples_of(call, agenda))

    # Its blocks

    def watches_blocks(self, call: ModelCall) -> bool:
        if is_dense_by_gradient():
            return False
        agenda = self._agendas[call.expert]
        return call.kind is not StepKind.FULL or any(agenda.kept(call.step, one) for one in samples_of(call, agenda))

    def enter(self, call: ModelCall, inputs: Streams) -> None:
        """A reuse step that finds nothing good to start from becomes a cache step."""
        agenda = self._agendas[call.expert]
        samples, rows = samples_of(call, agenda), call.rows
        parts = [[sample_of(stream, place, len(samples), rows) for stream in inputs] for place in range(len(samples))]
        adapters, wanted = self._adapters[call.expert].mark(), self.storage.wants_inputs
        entries: list[list[Hashable]] = [
            [adapters, *((tuple(stream.shape), stream.dtype, stream.device) for stream in part)] for part in parts
        ]
        copies = [tuple(stream.clone() for stream in part) if wanted else () for part in parts]
        self._entered = Entered(entries, copies, [])
        branch = (call.expert, call.branch)
        if call.kind is StepKind.REUSE:
            self._entered.starts = [
                self.stored.good(
                    branch, (sample, agenda.cutoff(call.step, sample)), entry, agenda.last_cache(call.step, sample)
                )
                for sample, entry in zip(samples, entries, strict=True)
            ]
            found = all(self._entered.starts)
            call.kind = StepKind.REUSE if found else StepKind.CACHE
            self._reused, self._missed = self._reused + found, self._missed + (not found)
        if call.kind is StepKind.CACHE:
            for sample in samples:
                self.stored.retain(branch, sample, frozenset(self._kept(call, sample)))

    def _kept(self, call: ModelCall, sample: int) -> Collection[int]:
        """The blocks whose output a call that runs all blocks keeps of a sample."""
        return self._agendas[call.expert].kept(call.step, sample)

    def blocks_skipped(self, call: ModelCall) -> int:
        return self._cutoff(call) if call.kind is StepKind.REUSE else 0

    def blocks_before(self, call: ModelCall) -> Collection[int]:
        return (self._cutoff(call),) if call.kind is StepKind.REUSE else ()

    def _cutoff(self, call: ModelCall) -> int:
        agenda = self._agendas[call.expert]
        return agenda.cutoff(call.step, samples_of(call, agenda)[0])

    def blocks_after(self, call: ModelCall) -> Collection[int]:
        if call.kind is StepKind.REUSE:
            return ()
        return {block for sample in samples_of(call, self._agendas[call.expert]) for block in self._kept(call, sample)}

    def before_block(self, call: ModelCall, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        given = zip(self._entered.starts, self._entered.inputs, strict=True)
        starts = [self.storage.outputs_at(_position(call), start, inputs) for start, inputs in given]
        return tuple(samples_joined(streams, call.rows) for streams in zip(*starts, strict=True))

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        agenda = self._agendas[call.expert]
        samples = samples_of(call, agenda)
        for place, sample in enumerate(samples):
            if index not in self._kept(call, sample):
                continue
            inputs = stored_by(self.storage, self._entered.inputs[place]) if self.storage.wants_inputs else None
            ours = stored_by(self.storage, tuple(sample_of(stream, place, len(samples), call.rows) for stream in outputs))
            fresh = Kept(_position(call), self._entered.entries[place], inputs, ours)
            last = agenda.last_cache(call.step, sample)
            self.stored.put((call.expert, call.branch), (sample, index), fresh, last)
        self.trace.cache_bytes = max(self.trace.cache_bytes, sum(one.nbytes for one in self.stored.all()))


def samples_of(call: ModelCall, agenda: Agenda) -> Sequence[int]:
    """Whom a call is about."""
    return agenda.samples if call.samples is None else call.samples


def alike(schedules: Sequence[Schedule]) -> Sequence[Schedule]:
    """One for the whole batch, if all are the same."""
    return schedules[:1] if len(set(schedules)) == 1 else schedules


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
        if len(session.denoisers) > 1:
            raise PolicyError(f"a policy decides for one transformer, this pipeline has {len(session.denoisers)}")
        plan.check(session.transformer)
    elif session.num_blocks > 1:
        for one, denoiser in zip(plans_for(plan, len(session.denoisers)), session.denoisers, strict=True):
            steps = 1 if isinstance(one, ReuseConfig) or not listed(one) else len(listed(one)[0])
            schedules_for(one, steps, depth_for(one, denoiser, session.num_blocks))


def depth_for(plan: ReuseConfig | Schedule | Sequence[Schedule], denoiser: Denoiser, deepest: int) -> int:
    """The depth that a plan must fit: a setting its denoiser's; schedules by hand the deepest, as any may run a step."""
    return denoiser.num_blocks if isinstance(plan, ReuseConfig) else deepest


def plans_for(
    plan: ReuseConfig | Schedule | Sequence[Schedule], num_denoisers: int
) -> Sequence[ReuseConfig | Schedule | Sequence[Schedule]]:
    """The plan as it is for each denoiser: all steps the same, a cutoff of its own if several are given.

    Raises:
        ScheduleError: not one cutoff for each.
    """
    return plan.of_each(num_denoisers) if isinstance(plan, ReuseConfig) else [plan] * num_denoisers


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
    check_length(schedules, num_steps)
    return list(alike(schedules))
