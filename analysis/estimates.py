"""What the sampler expects the picture to become, at every step: the scheduler's estimate of the clean sample, decoded."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.pictures import Picture

LARGEST_PIXELS = 128
"""Pictures larger than this are not decoded at every step: on a CPU that takes longer than drawing them."""


@contextmanager
def after_step(pipe: Any, act: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `act(scheduler, output)` after every step of the scheduler in the run inside; changes no bit of it.

    Args:
        pipe: a pipeline with a scheduler of its own, since the scheduler's `step` is watched.
        act: what it raises ends the run.
    """
    scheduler = pipe.scheduler

    @functools.wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        # Asked of the class on every call: while a session is open it is another one.
        output = type(scheduler).step(scheduler, *args, **(kwargs | {"return_dict": True}))
        act(scheduler, output)
        return output

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@contextmanager
def estimates_of(pipe: Any) -> Iterator[list[Tensor]]:
    """Collect the clean estimate of every step of the run inside.

    Yields:
        A list that fills up: one latent (b, c, h, w) a step. A second-order scheduler gives the estimate of its first stage.
    """
    calls, kept = itertools.count(), list[Tensor]()

    def keep(scheduler: Any, output: Any) -> None:
        if next(calls) % scheduler.order == 0:
            kept.append(clean_estimate(scheduler, output))

    with after_step(pipe, keep):
        yield kept


def clean_estimate(scheduler: Any, output: Any) -> Tensor:
    """What the scheduler took for the clean sample in the step that gave `output`."""
    if hasattr(output, "pred_original_sample"):
        estimate: Tensor = output.pred_original_sample
        return estimate
    converted: Tensor = scheduler.model_outputs[-1]  # DPM-Solver++ works on the clean estimate itself
    return converted


def decode_estimates(pipe: Any, estimates: list[Tensor]) -> list[Picture] | None:
    """The first sample's estimates as pictures, one a step; None where the pipeline draws no picture, or a large one."""
    vae = getattr(pipe, "vae", None)
    if vae is None or not estimates or estimates[0].ndim != 4:
        return None
    if estimates[0].shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1) > LARGEST_PIXELS:
        return None
    latents = torch.cat([estimate[:1] for estimate in estimates]) / vae.config.scaling_factor
    with torch.no_grad():
        pixels = (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
    return list((pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8))
