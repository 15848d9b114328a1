"""The session of a pipeline inside `accelerate`, `observe` or `record`: its scheduler is the step clock."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from blockdance.adapters import transformer_of
from blockdance.errors import ScheduleError, SessionError, UnsupportedModelError
from blockdance.patch import ACTIVE, check_free, scheduler_class, swapped, transformer_class
from blockdance.session import ModelCall, Part, Session


class ScheduledSession(Session):
    """Follows the scheduler: `set_timesteps` starts a run, every `step` ends one evaluation, and the number of a call since
    the last `step` is its guidance branch.

    Timestep values are never used; they repeat in second-order schedulers.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(transformer_of(pipe))
        self.scheduler = scheduler_of(pipe)
        self._places: list[tuple[int, int]] = []
        self._evaluation = 0
        self._step_calls: list[ModelCall] = []
        self._branches = 0
        self._unfit: ScheduleError | None = None
        """Why the run that began cannot be."""

    def after_set_timesteps(self, *_: Any, **__: Any) -> None:
        """A run begins."""
        self._begin_places(evaluation_places(self.scheduler))

    def after_set_begin_index(self, begin_index: int = 0, *_: Any, **__: Any) -> None:
        """Image-to-image runs only the timesteps from `begin_index` on: count those."""
        if begin_index:
            places = evaluation_places(self.scheduler)[begin_index:]
            first = places[0][0] if places else 0
            self._begin_places([(step - first, stage) for step, stage in places])

    def after_step(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation ends, and with the last one of a step, the step."""
        if self._evaluation >= len(self._places):
            return
        step = self._places[self._evaluation][0]
        self._evaluation += 1
        self._branches = 0
        over = self._evaluation == len(self._places)
        if over or self._places[self._evaluation][0] != step:
            calls, self._step_calls = self._step_calls, []
            sample = kwargs["sample"] if "sample" in kwargs else args[2]
            for part in self.parts:
                part.end_step(step, calls, len(sample))

    def _begin_places(self, places: list[tuple[int, int]]) -> None:
        self._places, self._evaluation, self._branches, self._step_calls = places, 0, 0, []
        self._unfit = None
        try:
            self.begin_run(places[-1][0] + 1 if places else 0)
        except ScheduleError as error:  # image-to-image says only afterwards how many of its steps it runs
            self._unfit = error

    def next_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
        if not self._places:
            raise SessionError("the transformer was called before scheduler.set_timesteps; call it inside the with block")
        if self._unfit is not None:
            raise self._unfit
        if self._evaluation >= len(self._places):
            raise SessionError(f"the run of {self.num_steps} steps is over; call scheduler.set_timesteps to start another")
        self._branches += 1
        return *self._places[self._evaluation], self._branches - 1

    def next_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        call = super().next_call(args, kwargs)
        self._step_calls.append(call)
        return call


def depth_of(pipe: Any) -> int:
    """L, the number of blocks on the depth axis of the pipeline's transformer.

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


def evaluation_places(scheduler: Any) -> list[tuple[int, int]]:
    """For every evaluation (one `scheduler.step`) of the run its (step, stage).

    Second-order schedulers (Heun, KDPM2) evaluate 2 n - 1 times for n steps, PNDM's Runge-Kutta start four times for
    each of the first three. Any other surplus counts as steps of its own.
    """
    evaluations, steps = len(scheduler.timesteps), scheduler.num_inference_steps
    start = getattr(scheduler, "prk_timesteps", None)
    if start is not None and len(start):
        return [divmod(k, 4) if k < len(start) else (len(start) // 4 + k - len(start), 0) for k in range(evaluations)]
    if getattr(scheduler, "order", 1) == 2 and evaluations == 2 * steps - 1:
        return [divmod(k, 2) for k in range(evaluations)]
    return [(k, 0) for k in range(evaluations)]


@contextmanager
def joined(pipe: Any, part: Part) -> Iterator[Session]:
    """Let `part` take part in the pipeline's session; the outermost caller opens it and restores everything at its end."""
    transformer = transformer_of(pipe)
    with ExitStack() as stack:
        active = [session for session in ACTIVE.get() if session.transformer is transformer]
        session = active[0] if active else stack.enter_context(opened(pipe))
        check_company(part, session.parts)
        session.parts.append(part)
        stack.callback(session.parts.remove, part)
        yield session


def check_company(part: Part, others: list[Part]) -> None:
    """Raise SessionError if `part` cannot share a session with `others`."""
    for other in others:
        if part.changes_the_run and other.changes_the_run:
            raise SessionError("this pipeline is accelerated already; leave the outer accelerate first")
        if (part.changes_the_run and other.needs_the_baseline) or (part.needs_the_baseline and other.changes_the_run):
            raise SessionError("record keeps the baseline, so it cannot be combined with accelerate")


@contextmanager
def opened(pipe: Any) -> Iterator[Session]:
    """A new session in this context: classes swapped inside, the original ones back at the end, whatever happened."""
    session = ScheduledSession(pipe)
    check_free(session.transformer)
    with session.swaps as swaps:
        swaps.enter_context(swapped(session.scheduler, scheduler_class))
        swaps.enter_context(swapped(session.transformer, transformer_class))
        token = ACTIVE.set((*ACTIVE.get(), session))
        swaps.callback(ACTIVE.reset, token)
        yield session
