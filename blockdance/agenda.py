"""What a denoiser's schedules ask for at every step of a run."""

from collections.abc import Collection, Sequence

from blockdance.errors import ScheduleError
from blockdance.schedule import Schedule, StepKind, check_cutoff


class Agenda:
    """The schedules of a batch, and what follows from them for the outputs that are kept.

    Args:
        schedules: one for the whole batch, or one for each sample.
        num_blocks: L, of the denoiser.
        points: how many cache steps a reuse step looks back to.
    """

    def __init__(self, schedules: Sequence[Schedule], num_blocks: int, points: int) -> None:
        self.schedules, self.num_blocks = list(schedules), num_blocks
        self.samples = range(len(self.schedules))
        """Of the batch, as far as they are told apart."""
        self.from_step = min(one.shared_prefix - (0 if one.first_reuse is None else points - 1) for one in schedules)
        """Steps before this one leave nothing behind, and may be replayed."""
        self._kept = [one.blocks_kept(points) for one in schedules]
        self.ever_kept = frozenset().union(*(blocks for kept in self._kept for blocks in kept))
        """Blocks whose output is kept at any step."""
        self._last_cache = [last_caches(one) for one in schedules]

    def keep(self, first: int, stop: int, blocks: Collection[int]) -> None:
        """Keep these blocks' outputs at the steps [first, stop), for what is not decided yet."""
        self.from_step = first
        self.ever_kept |= frozenset(blocks)
        for step in range(first, stop):
            self._kept[0][step] = frozenset(blocks)

    def kind(self, step: int, samples: Sequence[int]) -> StepKind:
        """What a step is for some samples; where they differ it is a cache step."""
        if len(samples) == 1:
            return self.schedules[samples[0]].kinds[step]
        kinds = {self.schedules[sample][step] for sample in samples}
        return kinds.pop() if len(kinds) == 1 else StepKind.CACHE

    def cutoff(self, step: int, sample: int) -> int:
        """Block i of a reuse step.

        Raises:
            ScheduleError: it does not fit the denoiser's depth.
        """
        cutoff = self.schedules[sample].cutoff_at(step)
        check_cutoff(cutoff, self.num_blocks)
        return cutoff

    def blocks_run(self, step: int, sample: int) -> int:
        """How many blocks run at a step."""
        return self.schedules[sample].blocks_at(step, self.num_blocks)

    def kept(self, step: int, sample: int) -> Collection[int]:
        """The blocks whose output a call that runs all blocks keeps: on a cache step, or on a step just before the first that a
        rule of several points looks back to."""
        planned = self.schedules[sample][step]
        looked_back_to = self.from_step <= step < self.schedules[sample].shared_prefix
        return self._kept[sample][step] if planned is not StepKind.FULL or looked_back_to else ()

    def last_cache(self, step: int, sample: int) -> int:
        """The last cache step before a step; just the step before, if there is none."""
        return self._last_cache[sample][step]

    def plans_reuse(self) -> bool:
        """Whether any step of any sample reuses."""
        return any(one.first_reuse is not None for one in self.schedules)


def last_caches(schedule: Schedule) -> list[int]:
    """For every step the last cache step before it; the step before it, if there is none."""
    found, last = [], None
    for step, kind in enumerate(schedule):
        found.append(step - 1 if last is None else last)
        last = step if kind is StepKind.CACHE else last
    return found


def check_length(schedules: Sequence[Schedule], num_steps: int) -> None:
    """Raise ScheduleError unless all have as many steps as the run."""
    for schedule in schedules:
        if len(schedule) != num_steps:
            raise ScheduleError(f"the schedule has {len(schedule)} steps, the run has {num_steps}")
