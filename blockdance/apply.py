"""BlockDance on a transformer without a pipeline, in the idiom of diffusers' `apply_*`: model calls are the step clock."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from torch import nn

from blockdance.branches import Branches
from blockdance.callers import MainCaller
from blockdance.clock import moment_of
from blockdance.company import check_free, check_no_cache
from blockdance.denoiser import Denoiser
from blockdance.errors import ConfigError, ScheduleError, SessionError, UnsupportedModelError
from blockdance.part import ModelCall
from blockdance.patch import applied_class, in_a_session
from blockdance.reuser import Reuser
from blockdance.schedule import ReuseConfig, Schedule, check_cutoff, default_cutoff, is_integer
from blockdance.session import Session
from blockdance.swap import swap_for
from blockdance.trace import Trace


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
        (config,) = self.of_each(1)
        assert not isinstance(config.cutoff_block, tuple)
        cutoff = default_cutoff(num_blocks) if config.cutoff_block is None else config.cutoff_block
        if self.reuse_interval == 1:
            return Schedule.dense(1)
        return Schedule.parse("c" + "r" * (self.reuse_interval - 1), cutoff)


@dataclass
class Progress:
    """How far one branch is in its run."""

    step: int = -1
    """Of its last call."""
    moment: Any = None
    """The timestep of its last call, as `moment_of` tells it."""
    direction: float = 0.0
    moved: bool = False
    """Whether its last call had another timestep than the one before."""


class CountedSession(Session):
    """Counts model calls, for each guidance branch by itself.

    A branch is a `cache_context` by its name, or the calls with the same text, from the same place. Its run ends when its steps
    are done, or when its timestep, falling or rising until then, turns back. Calls of other functions than the loop's, as of a
    callback, are left plain, unless they come with a name.
    """

    def __init__(self, transformer: nn.Module, config: BlockDanceConfig, swaps: ExitStack) -> None:
        super().__init__([Denoiser(transformer)])
        self.config, self.swaps = config, swaps
        plan = config.group(self.num_blocks) if config.endless and self.num_blocks > 1 else config
        self._reuser = Reuser(plan, Trace(self.num_blocks), replay=None)
        self.parts = [self._reuser]
        self.context: dict[str, Any] = {}
        self._caller = MainCaller()
        self.forget()

    def forget(self) -> None:
        """The next call begins a run."""
        self.num_steps = 0
        self._reuser.stored.clear()
        self._branches = Branches(self._drop)
        self._progress: dict[int, Progress] = {}

    def tell_misses(self) -> None:
        """Warn if nothing was reused although it was asked for."""
        if self.config.reuse_interval > 1 and self.num_blocks > 1:
            self._reuser.notes.tell_misses(self.calls_made)

    def _drop(self, branch: int) -> None:
        self._progress.pop(branch, None)
        self._reuser.drop_branch(0, branch)

    @contextmanager
    def inside(self, name: str, **where: Any) -> Iterator[None]:
        """As a `cache_context`: calls belong to the branch `name`, and are at `step_index` of the run if that is given."""
        before, self.context = self.context, {"name": name} | where
        try:
            yield
        finally:
            self.context = before

    def next_call(self, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> ModelCall | None:
        denoiser, name = self.denoisers[expert], self.context.get("name")
        conditioning, site = denoiser.conditioning(args, kwargs), self._caller.site(frame)
        look = self._branches.looks_like(name, conditioning, site, denoiser.hook_mark())
        branch = self._branches.number_of(look)
        place = self._step_of(branch, denoiser.named(args, kwargs).get("timestep")), 0, branch
        if not self._caller.is_run(frame.f_code, self._progress[branch].moved) and name is None:
            return None
        return self.made_call(expert, place, args, kwargs)

    def _step_of(self, branch: int, timestep: Any) -> int:
        """The step of the branch's next call, which begins a run if it is the first."""
        progress, total = self._progress.setdefault(branch, Progress()), self._total()
        given: int | None = self.context.get("step_index")
        step = progress.step + 1 if given is None else given
        if given is None:
            is_over = step >= total and not self.config.endless
            begins = self._turned_back(progress, timestep) or is_over
        else:
            begins = given < progress.step
        if begins:
            self._reuser.drop_branch(0, branch)
            step = given or 0
        if step == 0:
            check_no_cache(self.transformer)
        if total != self.num_steps:
            self.num_steps = total
            self._reuser.begin_run(self)
            self.check_fit()
        if step >= total and not self.config.endless:
            raise ScheduleError(
                f"the run is at step {step}, but num_steps is {total}; give the number of steps that really run"
            )
        progress.step = step
        return step % total

    def _turned_back(self, progress: Progress, timestep: Any) -> bool:
        """Whether a branch's timesteps rise after having fallen, or the other way round."""
        if timestep is None:
            return False
        moment, before = moment_of(timestep), progress.moment
        progress.moment = moment
        progress.moved = before is not None and moment.since(before) != 0
        if before is None:
            return False
        change = moment.since(before)
        turned = change is None or change * progress.direction < 0
        progress.direction = 0.0 if turned else progress.direction or change or 0.0
        return turned

    def _total(self) -> int:
        """Steps of the run, or of one group where groups follow each other without end."""
        if self.config.endless:
            return self.config.reuse_interval
        total: int | None = self.config.num_steps or self.context.get("num_inference_steps")
        if total is None:
            window = f"{self.config.window_start:g} to {self.config.window_end:g}"
            raise ScheduleError(
                f"num_steps is needed to place the window {window} in the run; give it, or window_start=0 and window_end=1"
            )
        return total


class Applied:
    """BlockDance on one transformer, until it is removed; each thread that calls the model has a run of its own."""

    def __init__(self, transformer: nn.Module, config: BlockDanceConfig) -> None:
        self.config = config
        self._transformer = transformer
        self._of_thread = threading.local()
        self._swaps = ExitStack()
        self.session()
        swap_for(self._swaps, transformer, applied_class(self))

    def session(self) -> CountedSession:
        """Of the current thread."""
        if not hasattr(self._of_thread, "session"):
            self._of_thread.session = CountedSession(self._transformer, self.config, self._swaps)
        session: CountedSession = self._of_thread.session
        return session

    def inside(self, name: str, **where: Any) -> Any:
        """A context in which calls belong to the branch `name`."""
        return self.session().inside(name, **where)

    def run_model(
        self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """As `Session.run_model`; after an exception the next call begins a run."""
        session = self.session()
        try:
            return session.run_model(run, model, args, kwargs, frame)
        except BaseException:
            session.forget()
            raise

    def reset(self) -> None:
        """The next call of this thread begins a run; needed only after a run that was cancelled at its first step."""
        self.session().forget()

    def remove(self) -> None:
        """Leave the transformer exactly as it was, and warn if nothing was reused; a second time does nothing."""
        self._swaps.close()
        self.session().tell_misses()


def apply_block_dance(transformer: nn.Module, config: ReuseConfig) -> Applied:
    """Put BlockDance on a transformer, for use in any pipeline or loop, until the returned handle's `remove`.

    Prefer `accelerate(pipe, ...)` where there is a pipeline: its scheduler tells the steps. Here model calls are counted, and
    guidance in two calls is told apart by `transformer.cache_context(name)`, or else by the text. `num_steps` counts calls: a
    second-order scheduler makes two in most steps. Where the pipeline gives no `step_index`, the timestep tells whether a run
    begins: its place among the scheduler's, or, where it was made anew and lies on a GPU, its value, which waits for that.

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
    num_blocks = Denoiser(transformer).num_blocks
    (one,) = config.of_each(1)
    if isinstance(one.cutoff_block, int) and num_blocks > 1:
        check_cutoff(one.cutoff_block, num_blocks)
    return Applied(transformer, config)
