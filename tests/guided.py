"""A pipeline of any class of the zoo: guidance in calls of their own, and whatever a test wants to happen in between."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from blockdance.adapters import REFUSED
from tests.zoo import ZOO, Tiny

MODELS = [tiny for tiny in ZOO if tiny.name not in REFUSED]
TWO = [tiny for tiny in MODELS if tiny.name in ("WanTransformer3DModel", "SD3Transformer2DModel")]
"""For what does not depend on the class: one with `cache_context`, and one without."""
TEXTS = ("encoder_hidden_states", "y")
Callback = Callable[["Guided", int, Tensor], None]
"""Called after every step with the pipeline, the step and the latent."""


class Guided:
    """Calls the transformer once for each text in a step, as pipelines do; all but latent and timestep stay the same."""

    def __init__(self, tiny: Tiny, scheduler: Any = None, texts: int = 2) -> None:
        self.tiny = tiny
        self.transformer: Any = tiny.build()
        self.scheduler: Any = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.conditions = [self.condition(seed) for seed in range(texts)]
        self.outputs: list[list[Tensor]] = []
        """Of every step of the last run, the output of every call."""

    def condition(self, seed: int) -> dict[str, Any]:
        """What a branch is about: everything but the latent and the timestep."""
        inputs = self.tiny.inputs(1)
        generator = torch.Generator().manual_seed(100 + seed)
        for name in TEXTS:
            if name in inputs:
                inputs[name] = torch.randn(inputs[name].shape, generator=generator)
        return {name: value for name, value in inputs.items() if name not in (self.tiny.latent, "timestep")}

    def latent(self, seed: int = 0) -> Tensor:
        """Noise."""
        latent = self.tiny.inputs(1)[self.tiny.latent]
        return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))

    def predict(self, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """One call of the transformer."""
        moment = timestep.expand(1).float()
        output: Tensor = self.transformer(**condition | {self.tiny.latent: latent, "timestep": moment}, return_dict=False)[0]
        return output

    @torch.no_grad()
    def __call__(
        self,
        steps: int = 10,
        seed: int = 0,
        branches: Callable[[int], Sequence[int]] | None = None,
        after: Callback | None = None,
        first: int = 0,
    ) -> Tensor:
        """Sample.

        Args:
            steps: of the scheduler.
            seed: of the noise.
            branches: which of the conditions are called at a step; by default all.
            after: called after every step.
            first: the first of the timesteps that is run.
        """
        latent, self.outputs = self.latent(seed), []
        self.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(self.scheduler.timesteps[first:]):
            which = range(len(self.conditions)) if branches is None else branches(step)
            outputs = []
            for branch in which:
                outputs.append(self.predict(latent, timestep, self.conditions[branch]))
            self.outputs.append(outputs)
            latent = self.scheduler.step(torch.stack(outputs).mean(dim=0), timestep, latent, return_dict=False)[0]
            if after is not None:
                after(self, step, latent)
        return latent
