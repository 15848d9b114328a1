"""The step clock: which step each evaluation of a run belongs to, as the scheduler tells it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int]
"""Step, and stage: 0, or the number of the further evaluation within the step."""


class Clock:
    """Counts the evaluations of a run; a scheduler's `step` ends each.

    Args:
        scheduler: after its `set_timesteps`.
        requested: the number of steps that was asked for; None where only timesteps or sigmas were given.
    """

    def __init__(self, scheduler: Any, requested: int | None) -> None:
        self._all_places = self._places = evaluation_places(scheduler, requested)
        self._timesteps = scheduler.timesteps
        self._at = self._begins_at = 0
        self.is_placed = False
        """Whether it is known at which of the timesteps the run begins."""

    @property
    def num_steps(self) -> int:
        """Of the run, as far as is known."""
        return self._places[-1][0] + 1 if self._places else 0

    @property
    def is_over(self) -> bool:
        """Whether every evaluation has ended."""
        return self._at >= len(self._places)

    @property
    def is_new(self) -> bool:
        """Whether no evaluation has ended."""
        return not self._at

    @property
    def place(self) -> Place:
        """Of the evaluation that is on."""
        return self._places[self._at]

    def end_evaluation(self) -> int | None:
        """The evaluation ended. Returns the step that ended with it, if one did."""
        step = self.place[0]
        self._at += 1
        return step if self.is_over or self.place[0] != step else None

    def begin_at(self, index: int) -> bool:
        """The run begins at this place of the timesteps, as image-to-image does. Returns whether that was news."""
        self.is_placed = True
        if index == self._begins_at or not 0 <= index < len(self._all_places):
            return False
        self._begins_at = index
        first = self._all_places[index][0]
        self._places = [(step - first, stage) for step, stage in self._all_places[index:]]
        return True

    @property
    def index(self) -> int:
        """Where the timestep of the evaluation that is on stands among the scheduler's."""
        return self._begins_at + self._at

    def index_of(self, timestep: Any) -> int | None:
        """Where a timestep stands, if it is a view of the scheduler's own; its value is not looked at."""
        if not isinstance(timestep, Tensor) or not isinstance(self._timesteps, Tensor):
            return None
        if not is_one_value(timestep) or not shares_storage(timestep, self._timesteps):
            return None
        index = int(timestep.storage_offset() - self._timesteps.storage_offset())
        return index if 0 <= index < len(self._timesteps) else None

    def place_after_step(self, scheduler: Any, timestep: Any) -> bool:
        """After the first evaluation the scheduler knows where it was. Returns whether that was news."""
        if self.is_placed:
            return False
        counted = getattr(scheduler, "step_index", None)
        index = counted - 1 if isinstance(counted, int) else self.index_of(timestep)
        if index is None and isinstance(self._timesteps, Tensor) and self._timesteps.device.type == "cpu":
            value = float(timestep) if isinstance(timestep, (int, float, Tensor)) else None
            values = self._timesteps.tolist()
            index = values.index(value) if value in values else None
        return self.begin_at(index or 0)


@dataclass(frozen=True)
class Moment:
    """A timestep to be compared with another one."""

    value: float
    """Or, on a GPU, its place in what it is a view of."""
    source: Tensor | None
    """What it is a view of; kept, so that nothing else gets its memory."""
    is_place: bool = False

    def since(self, before: "Moment") -> float | None:
        """By how much it went up or down; None if the two are not of the same run."""
        both = self.source is not None and before.source is not None
        if self.is_place != before.is_place or (both and not shares_storage(self.source, before.source)):
            return None
        return self.value - before.value


def moment_of(timestep: Any) -> Moment:
    """On a GPU a view of the scheduler's timesteps is known by its place; any other is read, which waits for the GPU."""
    if not isinstance(timestep, Tensor):
        return Moment(float(timestep), None)
    is_view = is_one_value(timestep) and timestep.untyped_storage().nbytes() > timestep.element_size()
    source = timestep if is_view else None
    if timestep.device.type != "cpu" and is_view:
        return Moment(float(timestep.storage_offset()), source, is_place=True)
    return Moment(float(timestep.max()), source)


def is_one_value(timestep: Tensor) -> bool:
    """Whether it is one number, perhaps expanded to all rows."""
    return timestep.numel() == 1 or not any(timestep.stride())


def shares_storage(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Whether one is a view of the other, or both are of a third."""
    if ours is None or theirs is None:
        return False
    return ours.untyped_storage()._cdata == theirs.untyped_storage()._cdata


def evaluation_places(scheduler: Any, requested: int | None = None) -> list[Place]:
    """For every evaluation (one `scheduler.step`) of the run its (step, stage).

    Second-order schedulers (Heun, KDPM2) evaluate 2 n - 1 times for n steps, PNDM's Runge-Kutta start four times for
    each of the first three. Where the timesteps are n + 1 and go straight down, the last is where the run arrives, and no
    evaluation (SCM, Wuerstchen). Any other surplus counts as steps of its own.
    """
    timesteps, start = scheduler.timesteps, getattr(scheduler, "prk_timesteps", None)
    evaluations, steps = len(timesteps), requested or getattr(scheduler, "num_inference_steps", None)
    if start is not None and len(start):
        return [divmod(k, 4) if k < len(start) else (len(start) // 4 + k - len(start), 0) for k in range(evaluations)]
    if steps is not None and getattr(scheduler, "order", 1) == 2 and evaluations == 2 * steps - 1:
        return [divmod(k, 2) for k in range(evaluations)]
    if steps is not None and evaluations == steps + 1 and goes_straight_down(timesteps):
        evaluations -= 1
    return [(k, 0) for k in range(evaluations)]


def goes_straight_down(timesteps: Any) -> bool:
    """Whether no timestep comes twice; looks at their values, which waits for their device once before the run."""
    values = torch.as_tensor(timesteps).tolist()
    return all(after < before for before, after in pairwise(values))
