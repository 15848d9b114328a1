"""The session of a pipeline inside `accelerate`, `observe` or `record`: its scheduler is the step clock."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

from blockdance import presence
from blockdance.branches import MOST, Branches
from blockdance.callers import Loop, functions
from blockdance.clock import Clock, evaluation_places, moment_of
from blockdance.company import check_free
from blockdance.denoiser import denoisers_of
from blockdance.errors import SessionError, UnsupportedModelError
from blockdance.part import ModelCall, Part
from blockdance.patch import NAME, scheduler_class, transformer_class
from blockdance.session import Session
from blockdance.swap import swap_for

__all__ = ["ScheduledSession", "depth_of", "evaluation_places", "joined", "scheduler_of"]


class ScheduledSession(Session):
    """Follows the scheduler: `set_timesteps` begins a run, every `step` ends one evaluation.

    A call belongs to the run if it is made while the run is on, and by the functions that make its calls in the first
    evaluation; what a callback calls is left plain. Timestep values are never used; they repeat in second-order schedulers.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(denoisers_of(pipe))
        self.scheduler = scheduler_of(pipe)
        self._pipe = pipe
        self._step = list(inspect.signature(self.scheduler.step).parameters)
        self._clock: Clock | None = None
        self._loop: Loop | None = None
        self._loop_functions: set[tuple[int, ...]] = set()
        self._other_functions: set[tuple[int, ...]] = set()
        """Of calls in this evaluation that do not seem to be the run's."""
        self._branches: list[Branches] = []
        self._calls: list[ModelCall] = []
        """Of this evaluation, and those of the step before it."""
        self._order = 0
        self._first_timestep: Any = None
        self._plain_calls = 0
        """Calls of the denoisers while no run was on, since a run was."""

    # The run

    def after_set_timesteps(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A run begins."""
        requested = kwargs.get("num_inference_steps", args[0] if args else None)
        self.give_up_run()
        self._clock = Clock(self.scheduler, requested if isinstance(requested, int) else None)
        self._loop = Loop(frame)
        self._begin()

    def after_set_begin_index(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Image-to-image runs only the timesteps from `begin_index` on: count those."""
        begin_index = kwargs.get("begin_index", args[0] if args else 0)
        if self._clock is not None and self._clock.is_new and self._clock.begin_at(begin_index):
            self._begin()

    def _begin(self) -> None:
        assert self._clock is not None
        self._branches = [Branches(partial(self._drop, expert), per_evaluation=True) for expert in range(len(self.denoisers))]
        self._loop_functions, self._other_functions = set(), set()
        self._calls, self._order, self._plain_calls = [], 0, 0
        self.begin_run(self._clock.num_steps)

    def _drop(self, expert: int, branch: int) -> None:
        for part in self.parts:
            part.drop_branch(expert, branch)

    def after_step(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An evaluation ends, and with the last one of a step, the step."""
        clock = self._clock
        if clock is None or clock.is_over:
            self._check_steps()
            return
        if clock.is_new and not clock.is_placed:
            timestep = argument_of(self._step, "timestep", args, kwargs)
            if clock.place_after_step(self.scheduler, timestep):
                self.resize_run(clock.num_steps)
            self.check_fit()
        if not self._order:
            self._loop_functions |= self._other_functions
        for branches in self._branches:
            branches.end_evaluation()
        self._other_functions, self._order = set(), 0
        step = clock.end_evaluation()
        if step is not None:
            sample = argument_of(self._step, "sample", args, kwargs)
            self._end_step(step, len(args[0] if sample is None else sample))
        if clock.is_over:
            self.give_up_run()

    def _end_step(self, step: int, sample_rows: int) -> None:
        calls, self._calls = self._calls, []
        self.steps_done = step + 1
        for part in self.parts:
            part.end_step(step, calls, sample_rows)

    def _check_steps(self) -> None:
        """Raise SessionError for a step outside of a run whose calls were plain."""
        if self._plain_calls and self._clock is None:
            raise SessionError("scheduler.set_timesteps was called before the with block; call it inside")
        if self._plain_calls:
            raise SessionError(f"the run of {self.num_steps} steps is over; call scheduler.set_timesteps to start another")

    def give_up_run(self) -> None:
        """Nothing more comes of the run that is on, if one is."""
        if self._loop is not None:
            self._loop, self._branches, self._calls, self._first_timestep = None, [], [], None
            for part in self.parts:
                part.end_run(self)

    def close(self) -> None:
        """In force no more; lets go of the frames of a run that was given up."""
        presence.leave(self)
        self._loop = None

    # Its calls

    @property
    def is_running(self) -> bool:
        """Whether a run is on."""
        return self._loop is not None

    def is_at(self, arguments: tuple[Any, Any]) -> bool:
        """Whether the timestep among them is a view of the scheduler's own."""
        if self._loop is None or self._clock is None:
            return False
        args, kwargs = arguments
        return any(self._clock.index_of(value) is not None for value in (*args, *kwargs.values()))

    def next_call(self, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> ModelCall | None:
        clock, denoiser = self._clock, self.denoisers[expert]
        if self._loop is None or clock is None:
            self._check_scheduler()
            self._plain_calls += 1
            return None
        site = self._loop.site(frame)
        through = functions(site)
        if clock.is_new:
            self._place(clock, args, kwargs)
            self._loop_functions.add(through)
        elif through not in self._loop_functions and clock.index not in map(clock.index_of, (*args, *kwargs.values())):
            self._check_scheduler()
            self._other_functions.add(through)
            return None
        named = NAME.get()
        arguments = denoiser.conditioning(args, kwargs)
        name = named[1] if named is not None and named[0] == id(denoiser.transformer) else None
        branches = self._branches[expert]
        branch = branches.branch_of(branches.looks_like(name, arguments, site, denoiser.hook_mark()))
        self._check_calls(branches, denoiser.named(args, kwargs).get("timestep"))
        call = self.made_call(expert, (*clock.place, branch), args, kwargs, self._order)
        self._order += 1
        self._calls.append(call)
        return call

    def _place(self, clock: Clock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call the timestep may tell which of the scheduler's it is."""
        if not clock.is_placed:
            found = [index for value in (*args, *kwargs.values()) if (index := clock.index_of(value)) is not None]
            if found and clock.begin_at(found[0]):
                self._begin()
        if clock.is_placed:
            self.check_fit()

    def _check_calls(self, branches: Branches, timestep: Any) -> None:
        """Raise SessionError where calls go on to another timestep and no step ends."""
        if not self._order:
            self._first_timestep = timestep
        if branches.most_alike <= MOST or timestep is None or self._first_timestep is None:
            return
        if moment_of(timestep).since(moment_of(self._first_timestep)) != 0:
            raise SessionError(
                f"the transformer was called {branches.most_alike} times for one branch and pipe.scheduler was not stepped: "
                "this pipeline steps copies of its scheduler, or none, so its steps cannot be told; "
                "apply_block_dance(pipe.transformer, BlockDanceConfig(num_steps=...)) counts the transformer's calls instead"
            )

    def _check_scheduler(self) -> None:
        """Raise SessionError if the pipeline has another scheduler than the one that is followed."""
        other = getattr(self._pipe, "scheduler", None)
        if other is not self.scheduler:
            raise SessionError(
                f"pipe.scheduler was replaced inside the with block ({type(self.scheduler).__name__} by "
                f"{type(other).__name__}), so its steps cannot be followed; replace it before"
            )


def argument_of(parameters: list[str], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument of that name; None if there is none."""
    place = parameters.index(name) if name in parameters else len(args)
    return args[place] if place < len(args) else kwargs.get(name)


def depth_of(pipe: Any) -> int:
    """L, the number of blocks on the depth axis of the pipeline's transformer; of several, the deepest.

    Raises:
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    return ScheduledSession(pipe).num_blocks


def scheduler_of(pipe: Any) -> Any:
    """The pipeline's scheduler.

    Raises:
        UnsupportedModelError: none, or one without `set_timesteps` and `step`, which the step clock needs.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise UnsupportedModelError(
            f"{type(pipe).__name__}'s scheduler ({type(scheduler).__name__}) needs set_timesteps and step to count the steps; "
            "use apply_block_dance(pipe.transformer, BlockDanceConfig(num_steps=...)), which counts the transformer's calls"
        )
    return scheduler


@contextmanager
def joined(pipe: Any, part: Part) -> Iterator[Session]:
    """Let `part` take part in the pipeline's session; the outermost caller opens it and restores everything at its end."""
    with ExitStack() as stack:
        outer = presence.opened_here(getattr(pipe, "scheduler", None))
        session = outer or stack.enter_context(opened(pipe))
        check_company(part, session.parts)
        session.parts.append(part)
        stack.callback(session.parts.remove, part)
        yield session
        if session is outer:
            part.end_run(session)
        else:
            session.give_up_run()


def check_company(part: Part, others: list[Part]) -> None:
    """Raise SessionError if `part` cannot share a session with `others`."""
    for other in others:
        if part.changes_the_run and other.changes_the_run:
            raise SessionError("this pipeline is accelerated already; leave the outer accelerate first")
        if (part.hides_blocks and other.needs_blocks) or (part.needs_blocks and other.hides_blocks):
            raise SessionError("observe sees every block, which a compiled forward hides; leave one of the two out")
        if (part.changes_the_run and other.needs_the_baseline) or (part.needs_the_baseline and other.changes_the_run):
            raise SessionError("record keeps the baseline, so it cannot be combined with accelerate")


@contextmanager
def opened(pipe: Any) -> Iterator[ScheduledSession]:
    """A new session in this context: classes swapped inside, the original ones back at the end, whatever happened."""
    session = ScheduledSession(pipe)
    for denoiser in session.denoisers:
        check_free(denoiser.transformer)
    with session.swaps as swaps:
        try:
            swap_for(swaps, session.scheduler, scheduler_class(session.scheduler))
        except TypeError as error:
            raise UnsupportedModelError(
                f"{type(session.scheduler).__name__} cannot be followed ({error}); give the pipeline the scheduler itself"
            ) from None
        for denoiser in session.denoisers:
            swap_for(swaps, denoiser.transformer, transformer_class)
        presence.enter(session)
        swaps.callback(session.close)
        yield session
