"""What reuse does in a run: store the output of block i on cache steps, start from it on reuse steps (Sec. 3.2)."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from blockdance.adapters import Streams
from blockdance.agenda import Agenda
from blockdance.arguments import leaves_of
from blockdance.batch import sample_of, samples_joined
from blockdance.compiled import compiled_forward
from blockdance.deciders import Decider, Given, alike, depth_for, plans_for, schedules_for
from blockdance.errors import ScheduleError, SessionError
from blockdance.kept import KeptOutputs
from blockdance.modelstate import AdapterWatch
from blockdance.moment import moment_of
from blockdance.notes import Notes
from blockdance.part import ModelCall, Part, Run
from blockdance.policy import Policy, undecided
from blockdance.replay import Recording
from blockdance.schedule import ReuseConfig, Schedule, StepKind
from blockdance.session import is_dense_by_gradient
from blockdance.storage import PAPER, Kept, StorageRule, stored_by
from blockdance.trace import Trace

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

    def __init__(
        self,
        plan: Decider,
        trace: Trace,
        replay: Recording | None,
        storage: StorageRule = PAPER,
        compiled: Mapping[str, Any] | None = None,
    ) -> None:
        self.plan = plan
        self.compiled = compiled
        """Options of torch.compile for the whole forward; None to run it as it is."""
        self.hides_blocks = compiled is not None
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
        self.notes = Notes(trace)
        self._entered = Entered([], [], [])

    # The run

    def begin_run(self, run: Run) -> None:
        self.stored.clear()
        self.notes.had_gradients = False
        self._adapters = [AdapterWatch(denoiser.transformer) for denoiser in run.denoisers]
        self.trace.decisions = ()
        self.resize_run(run)
        if self.replay is not None:
            self.replay.check_models(run.denoisers)

    def resize_run(self, run: Run) -> None:
        self._run, self._decides_at, self.unfit, self.trace.note = run, None, None, None
        self.notes.is_undecided = False
        if run.num_blocks < 2:
            self.notes.is_planned, self.trace.note = False, ONE_BLOCK
            self._follow([Schedule.dense(run.num_steps)])
        elif isinstance(self.plan, Policy):
            self._begin_undecided(self.plan, run.num_steps)
        else:
            self._begin_planned(self.plan, run)

    def _begin_planned(self, plan: Given, run: Run) -> None:
        if isinstance(plan, ReuseConfig):
            self.trace.note = plan.why_dense(run.num_steps)
            self.notes.is_planned = plan.reuse_interval > 1
        try:
            plans = zip(plans_for(plan, len(run.denoisers)), run.denoisers, strict=True)
            of_each = [schedules_for(one, run.num_steps, depth_for(one, denoiser, run.num_blocks)) for one, denoiser in plans]
        except ScheduleError as error:
            self.unfit, of_each = error, [[Schedule.dense(run.num_steps)]] * len(run.denoisers)
        self._follow(*of_each)
        if not isinstance(plan, ReuseConfig):
            self.notes.is_planned = any(agenda.plans_reuse() for agenda in self._agendas)

    def _begin_undecided(self, policy: Policy, num_steps: int) -> None:
        first = policy.decides_at(num_steps)
        self.notes.is_planned = True
        if first is None:
            self.trace.note = f"{num_steps} steps are too few for the policy to decide, so every step runs all blocks."
            self._follow([Schedule.dense(num_steps)])
            return
        self._follow([undecided(first, num_steps)])
        self._decides_at, self.notes.is_undecided = first, True
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
        self.notes.end_run(run)

    def drop_branch(self, expert: int, branch: int) -> None:
        self.stored.drop((expert, branch))

    # A call

    def begin_call(self, call: ModelCall) -> Any:
        if is_dense_by_gradient():
            self.notes.had_gradients = True
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
        return None if self.compiled is None else self._run_compiled(call, self.compiled)

    def _decide(self, call: ModelCall) -> None:
        """Ask the policy, and give every sample what was stored for the batch so far."""
        assert isinstance(self.plan, Policy)
        self._decides_at, self.notes.is_undecided = None, False
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
        samples = samples_of(call, self._agendas[call.expert])
        if len(samples) == 1 and not self.storage.wants_inputs:
            self._find_starts(call, [inputs], [()])
            return
        parts = [[sample_of(stream, place, len(samples), call.rows) for stream in inputs] for place in range(len(samples))]
        copies = [tuple(stream.clone() for stream in part) if self.storage.wants_inputs else () for part in parts]
        self._find_starts(call, parts, copies)

    def _find_starts(self, call: ModelCall, seen: Sequence[Sequence[Tensor]], copies: list[Streams]) -> None:
        """A reuse step that finds nothing good to start from becomes a cache step.

        Args:
            call: all blocks of which are still to run.
            seen: for each of its samples, tensors that must be like those of the call that stored.
            copies: of what the first block sees, if the storage rule wants it.
        """
        agenda, step, branch = self._agendas[call.expert], call.step, (call.expert, call.branch)
        adapters, samples = self._adapters[call.expert].mark(), samples_of(call, agenda)
        entries: list[list[Hashable]] = [
            [adapters, *((tuple(one.shape), one.dtype, one.device) for one in part)] for part in seen
        ]
        self._entered = Entered(entries, copies, [])
        if call.kind is StepKind.REUSE:
            self._entered.starts = [
                self.stored.good(branch, (sample, agenda.cutoff(step, sample)), entry, agenda.last_cache(step, sample))
                for sample, entry in zip(samples, entries, strict=True)
            ]
            found = all(self._entered.starts)
            call.kind = StepKind.REUSE if found else StepKind.CACHE
            self.notes.count(found)
        if call.kind is StepKind.CACHE:
            for sample in samples:
                self.stored.retain(branch, sample, frozenset(self._kept(call, sample)))

    def _run_compiled(self, call: ModelCall, options: Mapping[str, Any]) -> Any:
        """In a graph for all blocks, or for those after the cutoff."""
        agenda, denoiser = self._agendas[call.expert], call.denoiser
        if len(agenda.samples) > 1:
            raise SessionError("a compiled forward runs whole batches; run samples of different schedules one at a time")
        forward = compiled_forward(denoiser.transformer, denoiser.blocks, **options)
        leaves = leaves_of(denoiser.named(call.args, call.kwargs))
        self._find_starts(call, [[leaf for _, leaf in leaves if isinstance(leaf, Tensor)]], [()])
        call.blocks_evaluated = call.depth
        if call.kind is StepKind.REUSE:
            cutoff, skipped = self._cutoff(call), set(call.kwargs.get("skip_layers") or ())
            call.blocks_evaluated -= len(set(range(cutoff + 1)) - skipped)
            return forward.tail(cutoff, self.before_block(call, cutoff, (), {}), call.args, call.kwargs)
        output, streams = forward.all_blocks(agenda.ever_kept, call.args, call.kwargs)
        for index in streams.keys() & set(self.blocks_after(call)):
            self.after_block(call, index, streams[index])
        return output

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


def _position(call: ModelCall) -> float:
    return call.step + call.stage
