"""One session: a pipeline inside `accelerate`, `observe` or `record`, its step clock and the parts that take part."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockdance.adapters import Stack, blocks_of, stack_of, transformer_of
from blockdance.errors import SessionError, UnsupportedModelError
from blockdance.patch import ACTIVE, block_class, scheduler_class, swapped, transformer_class
from blockdance.schedule import StepKind


@dataclass
class ModelCall:
    """One call of the transformer."""

    step: int
    """Position in sampling order, 0 is the noisiest."""
    stage: int
    """0, or the number of the further evaluation within one step of a second-order scheduler."""
    branch: int
    """Ordinal of the call within one evaluation: 0 and 1 for guidance in two calls."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: StepKind = StepKind.FULL
    blocks_evaluated: int = 0
    replayed_seconds: float | None = None
    """Seconds the whole step took when it was recorded, if this call's output was replayed."""


class Part:
    """Something that takes part in a session; every hook may be left out."""

    changes_the_run = False
    """Whether it may keep blocks from running."""
    needs_the_baseline = False
    """Whether it makes sense only where every block runs."""

    def begin_run(self, session: "Session") -> None:
        """A scheduler has set its timesteps: a new run of `session.num_steps` steps begins."""

    def begin_call(self, call: ModelCall) -> Any:
        """Before the transformer runs. Returns its output to have it not run at all, else None."""

    def watches_blocks(self, call: ModelCall) -> bool:
        """Whether `before_block` and `after_block` matter in this call, which `begin_call` has seen."""
        return False

    def before_block(self, call: ModelCall, index: int, hidden: Tensor) -> Tensor | None:
        """Before block `index` runs on `hidden`. Returns its output to have it not run, else None."""

    def after_block(self, call: ModelCall, index: int, output: Tensor) -> None:
        """Block `index` ran."""

    def end_call(self, call: ModelCall, output: Any) -> None:
        """The transformer returned `output`."""

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        """The scheduler finished `step`; its `calls` in order, and the rows of the latent it worked on."""


class Session:
    """Connects one pipeline's transformer and scheduler with the parts, and keeps the step clock.

    The clock follows the scheduler: `set_timesteps` starts a run, every `step` ends one evaluation, and the number of a
    call since the last `step` is its guidance branch. Timestep values are never used; they repeat in second-order schedulers.
    """

    def __init__(self, pipe: Any) -> None:
        self.transformer: nn.Module = transformer_of(pipe)
        self.stack: Stack = stack_of(self.transformer)
        self.blocks = blocks_of(self.transformer)
        self.index_of = {id(block): index for index, block in enumerate(self.blocks)}
        self.scheduler = scheduler_of(pipe)
        self.parts: list[Part] = []
        self.num_steps = 0
        self._places: list[tuple[int, int]] = []
        self._evaluation = 0
        self._step_calls: list[ModelCall] = []
        self._branches = 0
        self._call: ModelCall | None = None
        self._watchers: list[Part] = []
        self._blocks_swapped = False
        self.swaps = ExitStack()
        """Undoes, at the session's end, what was swapped for it."""

    @property
    def num_blocks(self) -> int:
        """L, the depth of the transformer."""
        return len(self.blocks)

    def after_set_timesteps(self, *_: Any, **__: Any) -> None:
        """A run begins."""
        self._begin_run(evaluation_places(self.scheduler))

    def after_set_begin_index(self, begin_index: int = 0, *_: Any, **__: Any) -> None:
        """Image-to-image runs only the timesteps from `begin_index` on: count those."""
        if begin_index:
            places = evaluation_places(self.scheduler)[begin_index:]
            first = places[0][0] if places else 0
            self._begin_run([(step - first, stage) for step, stage in places])

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

    def _begin_run(self, places: list[tuple[int, int]]) -> None:
        self._places, self._evaluation, self._branches, self._step_calls = places, 0, 0, []
        self.num_steps = places[-1][0] + 1 if places else 0
        for part in self.parts:
            part.begin_run(self)

    def run_model(self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(model, *args, **kwargs)`, one call of the transformer, or what a part has in its place."""
        call = self._next_call(args, kwargs)
        output = None
        for part in self.parts:
            output = part.begin_call(call) if output is None else output
        if output is None:
            with self._blocks_watched(call):
                output = run(model, *args, **kwargs)
        for part in self.parts:
            part.end_call(call, output)
        return output

    @contextmanager
    def _blocks_watched(self, call: ModelCall) -> Iterator[None]:
        """Send the blocks of this call through `run_block` if a part wants it; else all of them run as in the plain model.

        They are swapped at the first call that needs it, so that a run which never reuses costs next to nothing.
        """
        self._watchers = [part for part in self.parts if part.watches_blocks(call)]
        if not self._watchers:
            call.blocks_evaluated = self.num_blocks
            yield
            return
        if not self._blocks_swapped:
            self._blocks_swapped = True
            for block in self.blocks:
                self.swaps.enter_context(swapped(block, block_class))
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _next_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        if not self._places:
            raise SessionError("the transformer was called before scheduler.set_timesteps; call it inside the with block")
        if self._evaluation >= len(self._places):
            raise SessionError(f"the run of {self.num_steps} steps is over; call scheduler.set_timesteps to start another")
        step, stage = self._places[self._evaluation]
        call = ModelCall(step, stage, self._branches, args, kwargs)
        self._branches += 1
        self._step_calls.append(call)
        return call

    def run_block(
        self, index: int, run: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`run(block, *args, **kwargs)`, or what a part has in its place."""
        call = self._call
        if call is None:
            return run(block, *args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        for part in self._watchers:
            output = part.before_block(call, index, hidden)
            if output is not None:
                return output
        output = run(block, *args, **kwargs)
        call.blocks_evaluated += 1
        for part in self._watchers:
            part.after_block(call, index, output)
        return output


def scheduler_of(pipe: Any) -> Any:
    """The pipeline's scheduler.

    Raises:
        UnsupportedModelError: none, or one without `set_timesteps` and `step`, which the step clock needs.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise UnsupportedModelError(
            f"{type(pipe).__name__}'s scheduler ({type(scheduler).__name__}) needs set_timesteps and step to count the steps"
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
    session = Session(pipe)
    with session.swaps as swaps:
        swaps.enter_context(swapped(session.scheduler, scheduler_class))
        swaps.enter_context(swapped(session.transformer, transformer_class))
        token = ACTIVE.set((*ACTIVE.get(), session))
        swaps.callback(ACTIVE.reset, token)
        yield session


def is_dense_by_gradient() -> bool:
    """With gradients on, checkpointing may run blocks again in another order: nothing may be stored or reused."""
    return torch.is_grad_enabled()
