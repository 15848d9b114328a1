"""What each step shall do. Pure Python: a schedule is data, and everything that decides produces one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from blockdance.errors import ConfigError, ScheduleError

MIN_STEPS = 4
"""With fewer steps adjacent ones differ too much to reuse (the paper's stated limitation); such runs stay dense."""


class StepKind(str, Enum):
    """`full`: all blocks run. `cache`: all run and block i's output is stored. `reuse`: blocks 0..i are skipped."""

    FULL = "f"
    CACHE = "c"
    REUSE = "r"


@dataclass(frozen=True)
class ReuseConfig:
    """The knobs of BlockDance's fixed schedule.

    Raises:
        ConfigError: a value outside its range.
    """

    reuse_interval: int = 2
    """The paper's N: one cache step, then N - 1 reuse steps. 1 never reuses."""
    cutoff_block: int | tuple[int, ...] | None = None
    """The paper's i: blocks 0..i are skipped on reuse steps, 0 <= i <= L - 2. None: three quarters of the L blocks. A tuple has
    one for each transformer of a pipeline with several, as the two experts of Wan 2.2."""
    window_start: float = 0.40
    """Reuse starts at this fraction of the run's steps, in [0, 1]."""
    window_end: float = 0.95
    """Reuse ends before this fraction of the run's steps, in [window_start, 1]."""

    def __post_init__(self) -> None:
        if not is_integer(self.reuse_interval) or self.reuse_interval < 1:
            raise ConfigError(f"reuse_interval must be an integer of at least 1, got {self.reuse_interval!r}")
        for cutoff in self.cutoff_block if isinstance(self.cutoff_block, tuple) else (self.cutoff_block,):
            if cutoff is not None and (not is_integer(cutoff) or cutoff < 0):
                raise ConfigError(f"cutoff_block must be None or an integer of at least 0, got {self.cutoff_block!r}")
        for name in ("window_start", "window_end"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a fraction in [0, 1], got {value!r}")
        if self.window_start > self.window_end:
            raise ConfigError(f"window_start must not exceed window_end, got {self.window_start} > {self.window_end}")

    def of_each(self, num_denoisers: int) -> list["ReuseConfig"]:
        """With the cutoff of each transformer of a pipeline.

        Raises:
            ScheduleError: there is not one cutoff for each.
        """
        if not isinstance(self.cutoff_block, tuple):
            return [self] * num_denoisers
        if len(self.cutoff_block) != num_denoisers:
            raise ScheduleError(
                f"cutoff_block must be one number, or one for each of {num_denoisers} transformers, got {self.cutoff_block}"
            )
        return [replace(self, cutoff_block=cutoff) for cutoff in self.cutoff_block]

    def window(self, num_steps: int) -> range:
        """The steps inside the window, half-open; the only place where fractions become steps."""
        return range(round(self.window_start * num_steps), round(self.window_end * num_steps))

    def why_dense(self, num_steps: int) -> str | None:
        """Why a run of `num_steps` steps would reuse nothing, as a sentence; None if it reuses."""
        if self.reuse_interval == 1:
            return "reuse_interval is 1, so every step runs all blocks."
        if num_steps < MIN_STEPS:
            return f"{num_steps} steps are too few to reuse (at least {MIN_STEPS} are needed), so every step runs all blocks."
        if len(self.window(num_steps)) < 2:
            return "The reuse window holds fewer than two steps, so every step runs all blocks."
        return None


@dataclass(frozen=True)
class Schedule:
    """One kind per step, in sampling order, and the block whose output is reused. Prints as `ffffcrcrf`.

    Reuse steps may differ in that block, as in `ffffcr9cr12f`; `with_cutoffs` makes such a schedule.

    Raises:
        ScheduleError: empty, a negative cutoff, or a reuse step with no cache step before it.
    """

    kinds: tuple[StepKind, ...]
    """What each step does; index 0 is the noisiest step."""
    cutoff_block: int
    """The paper's i, inclusive: blocks 0..i are skipped on reuse steps. The deepest, if they differ."""
    cutoffs: tuple[int, ...] = ()
    """The cutoff block of every step, if reuse steps differ in it; at other steps it means nothing."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ScheduleError("a schedule needs at least one step, got none")
        if not is_integer(self.cutoff_block) or self.cutoff_block < 0:
            raise ScheduleError(f"cutoff_block must be an integer of at least 0, got {self.cutoff_block!r}")
        reuse = self.first_reuse
        if reuse is not None and StepKind.CACHE not in self.kinds[:reuse]:
            raise ScheduleError(f"step {reuse} reuses but no step before it caches, in {self}")
        if self.cutoffs:
            self._check_cutoffs()

    def _check_cutoffs(self) -> None:
        if len(self.cutoffs) != len(self.kinds):
            raise ScheduleError(f"cutoffs must hold one block for each of {len(self)} steps, got {len(self.cutoffs)}")
        strange = [cutoff for cutoff in self.cutoffs if not is_integer(cutoff) or not 0 <= cutoff <= self.cutoff_block]
        if strange:
            raise ScheduleError(f"cutoffs must be integers in [0, {self.cutoff_block}], the cutoff_block, got {strange[0]!r}")

    @classmethod
    def parse(cls, text: str, cutoff_block: int) -> "Schedule":
        """The inverse of `str`: `Schedule.parse("ffffcrcrf", cutoff_block=20)`; an `r` may be followed by its own block."""
        strange = re.sub(r"[fc]|r\d*", "", text)
        if strange:
            raise ScheduleError(f"a schedule is written with the letters f, c and r, got {strange[0]!r} in {text!r}")
        steps: list[tuple[str, str]] = re.findall(r"([fcr])(\d*)", text)
        kinds = tuple(StepKind(letter) for letter, _ in steps)
        common = cls(kinds, cutoff_block)
        if not any(block for _, block in steps):
            return common
        return cls.with_cutoffs(kinds, [int(block or cutoff_block) for _, block in steps])

    @classmethod
    def with_cutoffs(cls, kinds: Sequence[StepKind], cutoffs: Sequence[int]) -> "Schedule":
        """A schedule whose reuse steps skip blocks up to a block of their own.

        Args:
            kinds: one per step.
            cutoffs: block i of every step; what it says of other than reuse steps does not matter.
        """
        reused = [cutoff for kind, cutoff in zip(kinds, cutoffs, strict=True) if kind is StepKind.REUSE]
        if len(set(reused)) <= 1:
            return cls(tuple(kinds), reused[0] if reused else 0)
        deepest = max(reused)
        ours = [cutoff if kind is StepKind.REUSE else deepest for kind, cutoff in zip(kinds, cutoffs, strict=True)]
        return cls(tuple(kinds), deepest, tuple(ours))

    @classmethod
    def dense(cls, num_steps: int) -> "Schedule":
        """`num_steps` full steps: the baseline."""
        return cls((StepKind.FULL,) * num_steps, cutoff_block=0)

    def __str__(self) -> str:
        blocks = [str(cutoff) if kind is StepKind.REUSE else "" for kind, cutoff in zip(self.kinds, self.cutoffs, strict=False)]
        return "".join(kind.value + block for kind, block in zip(self.kinds, blocks or [""] * len(self), strict=True))

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, step: int) -> StepKind:
        return self.kinds[step]

    def __iter__(self) -> Iterator[StepKind]:
        return iter(self.kinds)

    @property
    def first_reuse(self) -> int | None:
        """The first reuse step, None if no step reuses."""
        return self.kinds.index(StepKind.REUSE) if StepKind.REUSE in self.kinds else None

    @property
    def shared_prefix(self) -> int:
        """How many leading steps equal the baseline's and may be replayed: all before the cache step of the first reuse."""
        reuse = self.first_reuse
        if reuse is None:
            return len(self)
        return max(step for step in range(reuse) if self.kinds[step] is StepKind.CACHE)

    def cutoff_at(self, step: int) -> int:
        """Block i of a reuse step."""
        return self.cutoffs[step] if self.cutoffs else self.cutoff_block

    def blocks_kept(self, points: int = 1) -> list[frozenset[int]]:
        """For every step the blocks whose output later reuse steps start from, if each looks back to `points` cache steps."""
        kept: list[frozenset[int]] = []
        reused: list[frozenset[int]] = [frozenset()]
        """By how many cache steps come before, the blocks that later steps reuse."""
        for step in reversed(range(len(self))):
            kept.append(frozenset().union(*reused[:points]))
            if self.kinds[step] is StepKind.REUSE:
                reused[0] |= {self.cutoff_at(step)}
            if self.kinds[step] is StepKind.CACHE:
                reused.insert(0, frozenset())
        return kept[::-1]

    def blocks_kept_at(self, step: int, points: int = 1) -> frozenset[int]:
        """`blocks_kept` of one step."""
        return self.blocks_kept(points)[step]

    def blocks_at(self, step: int, num_blocks: int) -> int:
        """How many of `num_blocks` blocks run at `step`."""
        return num_blocks - self.cutoff_at(step) - 1 if self.kinds[step] is StepKind.REUSE else num_blocks

    def block_evaluations(self, num_blocks: int) -> int:
        """Blocks run over all steps, for one model call per step."""
        return sum(self.blocks_at(step, num_blocks) for step in range(len(self)))

    def ideal_speedup(self, num_blocks: int, overhead_blocks: float = 0.0) -> float:
        """Baseline cost over ours, from exact block counts (the cost model's exact form).

        Args:
            num_blocks: L, the depth of the transformer.
            overhead_blocks: what a step costs outside the blocks, in units of one block's cost, >= 0.

        Raises:
            ScheduleError: the cutoff does not fit the depth.
        """
        self.check_depth(num_blocks)
        outside = overhead_blocks * len(self)
        return (num_blocks * len(self) + outside) / (self.block_evaluations(num_blocks) + outside)

    def check_depth(self, num_blocks: int) -> None:
        """Raise ScheduleError unless 0 <= cutoff_block <= num_blocks - 2."""
        check_cutoff(self.cutoff_block, num_blocks)


def check_cutoff(cutoff_block: int, num_blocks: int) -> None:
    """Raise ScheduleError unless 0 <= cutoff_block <= num_blocks - 2."""
    if not 0 <= cutoff_block <= num_blocks - 2:
        raise ScheduleError(f"cutoff_block must be in [0, {num_blocks - 2}] for {num_blocks} blocks, got {cutoff_block}")


def default_cutoff(num_blocks: int) -> int:
    """Three quarters of the depth: block 20 of 28, as in the paper; at least one block is left to run."""
    return min(max(0, round(0.75 * num_blocks) - 1), num_blocks - 2)


def fixed_schedule(config: ReuseConfig, num_steps: int, num_blocks: int) -> Schedule:
    """BlockDance's schedule (Sec. 3.2): inside the window, groups of one cache step and N - 1 reuse steps.

    Args:
        config: interval, cutoff and window.
        num_steps: the run's sampling steps, >= 1.
        num_blocks: L, the depth of the transformer, >= 2.

    Returns:
        A schedule of `num_steps` kinds; all full where nothing can be reused (`config.why_dense` says why).

    Raises:
        ScheduleError: no steps, or the cutoff does not fit the depth.
    """
    if num_steps < 1:
        raise ScheduleError(f"num_steps must be at least 1, got {num_steps}")
    (config,) = config.of_each(1)
    assert not isinstance(config.cutoff_block, tuple)
    cutoff = default_cutoff(num_blocks) if config.cutoff_block is None else config.cutoff_block
    check_cutoff(cutoff, num_blocks)
    if config.why_dense(num_steps):
        return Schedule((StepKind.FULL,) * num_steps, cutoff)
    window = config.window(num_steps)

    def kind(step: int) -> StepKind:
        if step not in window:
            return StepKind.FULL
        return StepKind.REUSE if (step - window.start) % config.reuse_interval else StepKind.CACHE

    return Schedule(tuple(kind(step) for step in range(num_steps)), cutoff)


def is_integer(value: object) -> bool:
    """True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
