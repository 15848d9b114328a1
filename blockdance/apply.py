"""BlockDance on a transformer without a pipeline, in the idiom of diffusers' `apply_*`: model calls are the step clock."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from blockdance.errors import ConfigError, ScheduleError, SessionError, UnsupportedModelError
from blockdance.patch import ACTIVE, applied_class, block_class, check_free, in_a_session, swap_in, swap_out
from blockdance.reuser import Reuser
from blockdance.schedule import ReuseConfig, Schedule, check_cutoff, default_cutoff, is_integer
from blockdance.session import Session, same_tensors, tensors_of
from blockdance.trace import Trace

MAX_BRANCHES = 8
"""Guidance branches remembered at most; a text that changes with every call makes a new one each time."""


@dataclass(frozen=True)
class BlockDanceConfig(ReuseConfig):
    """`ReuseConfig`, and the length of the run, which no scheduler tells here.

    Raises:
        ConfigError: a value outside its range.
    """

    num_steps: int | None = None
    """Model calls per guidance branch in one run, >= 1. Not needed for a window of 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None and (not is_integer(self.num_steps) or self.num_steps < 1):
            raise ConfigError(f"num_steps must be None or an integer of at least 1, got {self.num_steps!r}")

    @property
    def endless(self) -> bool:
        """Whether groups of N steps follow each other without a last one."""
        return self.num_steps is None and (self.window_start, self.window_end) == (0, 1)

    def group(self, num_blocks: int) -> Schedule:
        """One cache step and N - 1 reuse steps."""
        cutoff = default_cutoff(num_blocks) if self.cutoff_block is None else self.cutoff_block
        if self.reuse_interval == 1:
            return Schedule.dense(1)
        return Schedule.parse("c" + "r" * (self.reuse_interval - 1), cutoff)


class CountedSession(Session):
    """Counts model calls, for each guidance branch by itself.

    A branch is a `cache_context` by its name, and outside of one the calls with the same text (all tensors but latent and
    timestep). A run ends when its steps are done, or when the timestep, falling or rising until then, turns back.
    """

    def __init__(self, transformer: nn.Module, config: BlockDanceConfig) -> None:
        super().__init__(transformer)
        self.config = config
        self._blocks_swapped = True
        plan = config.group(self.num_blocks) if config.endless else config
        self._reuser = Reuser(plan, Trace(self.num_blocks), replay=None)
        self.parts = [self._reuser]
        self._context: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """The next call begins a run."""
        self.num_steps = 0
        self._reuser.stored.clear()
        self._texts: dict[int, str | list[Tensor]] = {}
        self._calls: dict[int, int] = {}
        self._moment: float | None = None
        self._direction = 0.0

    @contextmanager
    def inside(self, name: str, **where: Any) -> Iterator[None]:
        """As a `cache_context`: calls belong to the branch `name`, and are at `step_index` of the run if that is given."""
        before, self._context = self._context, {"name": name} | where
        try:
            yield
        finally:
            self._context = before

    def next_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
        arguments = self.named(args, kwargs)
        given: int | None = self._context.get("step_index")
        total = self._total()
        branch = self._branch_of(arguments)
        step = self._calls.get(branch, 0) if given is None else given
        if self._begins(arguments, given, step, total):
            moment = self._moment
            self.forget()
            self._moment = moment
            self.begin_run(total)
            branch, step = self._branch_of(arguments), given or 0
        if step >= total and not self.config.endless:
            raise ScheduleError(
                f"the run is at step {step}, but num_steps is {total}; give the number of steps that really run"
            )
        self._calls[branch] = step + 1
        return step % total, 0, branch

    def _begins(self, arguments: dict[str, Any], given: int | None, step: int, total: int) -> bool:
        """Whether a run begins with this call."""
        if given is not None:
            return not self.num_steps or given + 1 < max(self._calls.values())
        turned = self._turned_back(arguments.get("timestep"))
        return turned or not self.num_steps or (step >= total and not self.config.endless)

    def _turned_back(self, timestep: Any) -> bool:
        """Whether timesteps rise after having fallen, or the other way round."""
        if timestep is None:
            return False
        moment = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        change = 0.0 if self._moment is None else moment - self._moment
        self._moment = moment
        self._direction = self._direction or change
        return change * self._direction < 0

    def _total(self) -> int:
        """Steps of the run, or of one group where groups follow each other without end."""
        if self.config.endless:
            return self.config.reuse_interval
        total: int | None = self.config.num_steps or self._context.get("num_inference_steps")
        if total is None:
            window = f"{self.config.window_start:g} to {self.config.window_end:g}"
            raise ScheduleError(
                f"num_steps is needed to place the window {window} in the run; give it, or window_start=0 and window_end=1"
            )
        return total

    def _branch_of(self, arguments: dict[str, Any]) -> int:
        """An ordinal for the context's name, or for the text."""
        text: str | list[Tensor] | None = self._context.get("name")
        if text is None:
            text = tensors_of(
                (), {name: value for name, value in arguments.items() if name not in (self.latent_name, "timestep")}
            )
        for branch, known in self._texts.items():
            if known == text if isinstance(text, str) or isinstance(known, str) else same_tensors(known, text):
                return branch
        return self._new_branch(text)

    def _new_branch(self, text: str | list[Tensor]) -> int:
        branch = max(self._texts, default=-1) + 1
        self._texts[branch] = text
        if len(self._texts) > MAX_BRANCHES:
            oldest = min(self._texts)
            for memory in (self._texts, self._calls, self._reuser.stored):
                memory.pop(oldest, None)
        return branch


class Applied:
    """BlockDance on one transformer, until it is removed; each thread that calls the model has a run of its own."""

    def __init__(self, transformer: nn.Module, config: BlockDanceConfig) -> None:
        self.config = config
        self._transformer = transformer
        self._of_thread = threading.local()
        self._swaps = ExitStack()
        for block in self.session().blocks:
            self._swap(block.module, block_class)
        self._swap(transformer, applied_class(self))

    def _swap(self, module: nn.Module, make_class: Callable[[type], type]) -> None:
        swap_in(module, make_class)
        self._swaps.callback(swap_out, module)

    def session(self) -> CountedSession:
        """Of the current thread."""
        if not hasattr(self._of_thread, "session"):
            self._of_thread.session = CountedSession(self._transformer, self.config)
        session: CountedSession = self._of_thread.session
        return session

    def run_model(self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Session.run_model`; after an exception the next call begins a run."""
        session = self.session()
        token = ACTIVE.set((*ACTIVE.get(), session))
        try:
            return session.run_model(run, model, args, kwargs)
        except BaseException:
            session.forget()
            raise
        finally:
            ACTIVE.reset(token)

    def reset(self) -> None:
        """The next call of this thread begins a run; needed only after a run that was cancelled at its first step."""
        self.session().forget()

    def remove(self) -> None:
        """Leave the transformer exactly as it was; a second time does nothing."""
        self._swaps.close()


def apply_block_dance(transformer: nn.Module, config: ReuseConfig) -> Applied:
    """Put BlockDance on a transformer, for use in any pipeline or loop, until the returned handle's `remove`.

    Prefer `accelerate(pipe, ...)` where there is a pipeline: its scheduler tells the steps. Here model calls are counted, and
    guidance in two calls is told apart by `transformer.cache_context(name)`, or else by the text. `num_steps` counts calls: a
    second-order scheduler makes two in most steps. Unless the pipeline gives a `step_index`, the timestep is read on
    every call, which waits for the device.

    Args:
        transformer: of a supported class, or one that passes the self-test at its first call.
        config: a `BlockDanceConfig`; a `ReuseConfig` is one without `num_steps`.

    Raises:
        ConfigError: the config is neither.
        UnsupportedModelError: no transformer, or one that reuse would break.
        ScheduleError: the cutoff does not fit the depth; later, at a call, the window needs `num_steps`.
        SessionError: something is applied to it already.
    """
    if not isinstance(transformer, nn.Module):
        raise UnsupportedModelError(
            f"apply_block_dance takes a transformer, got {type(transformer).__name__}; pass pipe.transformer, "
            "or use accelerate(pipe, ...)"
        )
    if not isinstance(config, ReuseConfig):
        kind = type(config).__name__
        raise ConfigError(f"config must be a BlockDanceConfig, got {kind}; a Schedule goes with accelerate(pipe, ...)")
    if not isinstance(config, BlockDanceConfig):
        config = BlockDanceConfig(**asdict(config))
    check_free(transformer)
    if in_a_session(transformer):
        raise SessionError("this transformer is accelerated or observed just now; leave that with block first")
    num_blocks = Session(transformer).num_blocks
    if config.cutoff_block is not None:
        check_cutoff(config.cutoff_block, num_blocks)
    return Applied(transformer, config)
