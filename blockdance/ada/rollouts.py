"""What a policy is trained in: baselines that are drawn once, and runs of the rest with schedules that are tried."""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockdance.accelerate import accelerate
from blockdance.batch import samples_joined
from blockdance.errors import UnsupportedModelError
from blockdance.moment import moment_of
from blockdance.part import ModelCall, Part, Run
from blockdance.policy import Moment
from blockdance.replay import Recording, record
from blockdance.schedule import Schedule
from blockdance.scheduled import joined
from blockdance.storage import StorageRule

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Task:
    """What to draw."""

    prompt: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Scene:
    """The baseline of a task."""

    task: Task
    picture: Pixels
    moment: Moment
    """What a policy sees of it, one sample."""
    recording: Recording
    rows: int
    """Of one call of the transformer."""


class Watcher(Part):
    """Keeps what a policy would see at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.moment: Moment | None = None
        self.rows = 0
        self._sample_rows = 0

    def begin_run(self, run: Run) -> None:
        self._num_steps = run.num_steps

    def begin_call(self, call: ModelCall) -> None:
        if call.step == self.step and self.moment is None:
            seen = moment_of(call, self._sample_rows, self._num_steps)
            self.moment = Moment(seen.latent.clone(), seen.text, seen.text_mask, seen.num_steps)
            self.rows = call.rows

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        self._sample_rows = sample_rows


class Environment:
    """Draws tasks plainly, and again with schedules from where the baseline leaves off.

    Args:
        pipe: a diffusers text-to-image pipeline; its scheduler is used.
        rho: the share of the run after which a policy decides.
        storage: what reuse steps start from.
        call: further arguments of the pipeline's call.
        capacity: how many baselines are remembered.

    Raises:
        UnsupportedModelError: the pipeline takes no text, draws videos, or does not take one of the arguments.
    """

    def __init__(self, pipe: Any, rho: float, storage: StorageRule, call: dict[str, Any], capacity: int = 1500) -> None:
        check_pipeline(pipe, call)
        self.pipe, self.rho, self.storage, self.call, self.capacity = pipe, rho, storage, call, capacity
        self._scenes: OrderedDict[Task, Scene] = OrderedDict()

    def scene(self, task: Task) -> Scene:
        """The task's baseline; drawn at the first time."""
        if task not in self._scenes:
            self._scenes[task] = self._new_scene(task)
            while len(self._scenes) > self.capacity:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(task)
        return self._scenes[task]

    def _new_scene(self, task: Task) -> Scene:
        watcher = Watcher(round(self.rho * task.steps))
        with joined(self.pipe, watcher), record(self.pipe) as recording:
            picture = self._draw(task, 1)[0]
        assert watcher.moment is not None
        return Scene(task, picture, watcher.moment, recording, watcher.rows)

    def play(self, scene: Scene, schedules: Sequence[Schedule]) -> list[Pixels]:
        """The task's pictures with these schedules, in one batch; the steps they share with the baseline are replayed."""
        whole = repeated(scene.recording, len(schedules), scene.rows)
        with accelerate(self.pipe, list(schedules), storage=self.storage, replay=whole):
            return self._draw(scene.task, len(schedules))

    def _draw(self, task: Task, times: int) -> list[Pixels]:
        same = [torch.Generator().manual_seed(task.seed) for _ in range(times)]
        output = self.pipe(
            task.prompt, num_inference_steps=task.steps, num_images_per_prompt=times, generator=same,
            output_type="np", **self.call,
        )  # fmt: skip
        return [(picture * 255).round().astype(np.uint8) for picture in output.images]


def check_pipeline(pipe: Any, call: dict[str, Any]) -> None:
    """Raise UnsupportedModelError unless it draws several pictures of a text, and takes these arguments too."""
    calls = [vars(base)["__call__"] for base in type(pipe).__mro__ if "__call__" in vars(base)]
    taken = {name for one in calls for name in inspect.signature(one).parameters}
    lacks = [name for name in ("prompt", "num_images_per_prompt", *call) if name not in taken]
    if lacks or {"num_frames", "video_length"} & taken:
        reason = f"takes no {lacks[0]}" if lacks else "draws videos"
        raise UnsupportedModelError(f"a policy is trained with a text-to-image pipeline; {type(pipe).__name__} {reason}")


def repeated(recording: Recording, times: int, rows: int) -> Recording:
    """The recording of a batch in which the one recorded sample comes several times."""

    def several(value: Tensor) -> Tensor:
        if not value.ndim or len(value) != rows:
            return value
        return samples_joined([value] * times, rows * times)

    def output(value: Any) -> Any:
        if isinstance(value, Tensor):
            return several(value)
        if isinstance(value, tuple):
            return tuple(map(several, value))
        return type(value)(sample=several(value.sample))

    inputs = {key: [several(value) for value in values] for key, values in recording.inputs.items()}
    outputs = {key: output(value) for key, value in recording.outputs.items()}
    return replace(recording, inputs=inputs, outputs=outputs)
