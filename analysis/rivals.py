"""What a user would pick instead of BlockDance, each behind one small adapter that makes it run correctly on these models."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    CacheMixin,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from analysis.calibration import Calibration
from analysis.experiment import Request, sample
from analysis.optional_rivals import cache_dit_mask, cache_dit_threshold, output_errors, smooth_cache
from analysis.restoring import restored
from blockdance import Extrapolated, ReuseConfig, accelerate, fixed_schedule, load_demo_profile
from blockdance.plan import Planner
from blockdance.scheduled import depth_of
from blockdance.storage import PAPER, Residual, StorageRule

ATTENTION_AND_MLP = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
"""What TaylorSeer predicts; its own default matches nothing in DiT and PixArt."""

Applied = Callable[[Any, Request, str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """A way to draw faster, and the settings to sweep."""

    knob: str
    """What the settings are, as a phrase."""
    sweep: tuple[str, ...]
    applied: Applied
    """Puts the method on a pipeline for the runs inside, for a request and a setting; leaving restores the pipeline."""
    steps: Callable[[Request, str], int] = lambda request, _: request.steps
    prepare: Callable[[Any, Request], object] | None = None
    """What is done once for a model and a request, outside of any measurement."""
    package: str | None = None
    """What must be installed for it, beyond requirements.txt."""


def with_caches(cls: type) -> type:
    """The class with diffusers' cache interface, and with a context open around every call, which these pipelines do not do.

    One context serves both guidance branches, as they are one batch.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.cache_context("both"):
            return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls, CacheMixin), {"__call__": __call__, "__module__": cls.__module__})


@contextmanager
def cached(pipe: Any, config: Any) -> Iterator[None]:
    """One of diffusers' caches, with fresh state; the transformer's class and hooks are as before afterwards."""
    transformer = pipe.transformer
    cls = type(transformer)
    with restored(pipe):
        transformer.__class__ = with_caches(cls)
        try:
            transformer.enable_cache(config)
            yield
            transformer.disable_cache()
        finally:
            transformer.__class__ = cls


def block_dance(pipe: Any, request: Request, knob: str, storage: StorageRule = PAPER) -> AbstractContextManager[Any]:
    """`N,i,start`: interval, cutoff block, and where the window starts; it ends at 0.95."""
    interval, cutoff, start = knob.split(",")
    config = ReuseConfig(int(interval), int(cutoff), float(start), 0.95)
    return accelerate(pipe, fixed_schedule(config, request.steps, depth_of(pipe)), storage=storage)


def first_block_cache(pipe: Any, request: Request, knob: str) -> AbstractContextManager[Any]:
    """`threshold` on the change of the first block's residual."""
    return cached(pipe, FirstBlockCacheConfig(threshold=float(knob)))


def taylorseer(pipe: Any, request: Request, knob: str) -> AbstractContextManager[Any]:
    """`interval,order`: full steps this far apart, and in between a Taylor polynomial of this order."""
    interval, order = map(int, knob.split(","))
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=ATTENTION_AND_MLP,
    )
    return cached(pipe, config)


@contextmanager
def pyramid_attention_broadcast(pipe: Any, request: Request, knob: str) -> Iterator[None]:
    """`range`: attention outputs are computed once in that many steps, between timesteps 100 and 800, its authors' range."""
    now: list[int] = [0]

    def note_timestep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        timestep: Tensor = kwargs["timestep"]
        now[0] = int(timestep.flatten()[0])

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(knob),
        cross_attention_block_skip_range=int(knob),
        spatial_attention_timestep_skip_range=(100, 800),
        cross_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("transformer_blocks",),
        cross_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: now[0],
    )
    hook = pipe.transformer.register_forward_pre_hook(note_timestep, with_kwargs=True)
    try:
        with cached(pipe, config):
            yield
    finally:
        hook.remove()


def mag_cache(pipe: Any, request: Request, knob: str) -> AbstractContextManager[Any]:
    """`threshold` on the accumulated change of the residual's magnitude, which is calibrated once, on one prompt."""
    ratios = MAGNITUDE_RATIOS(pipe, request)
    return cached(pipe, MagCacheConfig(threshold=float(knob), num_inference_steps=request.steps, mag_ratios=ratios))


def magnitude_ratios(pipe: Any, request: Request) -> list[float]:
    """How long the residual of all blocks is at each step, over the step before; the first is 1."""
    residuals: list[Tensor] = []
    entered: list[Tensor] = []
    blocks = pipe.transformer.transformer_blocks
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].clone())),
        blocks[-1].register_forward_hook(lambda _, __, out: residuals.append(out - entered[-1])),
    ]
    sample(pipe, request)
    for hook in hooks:
        hook.remove()
    lengths = [residual.norm(dim=-1) for residual in residuals]
    return [1.0] + [float((now / before).mean()) for before, now in pairwise(lengths)]


MAGNITUDE_RATIOS = Calibration(magnitude_ratios)
OUTPUT_ERRORS = Calibration(output_errors)


def calibrated_smooth_cache(pipe: Any, request: Request, knob: str) -> AbstractContextManager[Any]:
    """`threshold` on how far an output is from that of the last computed step, by kind of output."""
    return smooth_cache(pipe, OUTPUT_ERRORS(pipe, request), float(knob))


def planned(pipe: Any, request: Request, knob: str, storage: StorageRule = PAPER) -> AbstractContextManager[Any]:
    """`speedup`, ideal, that the planner is asked for, or its most; the model in the box alone has a profile to plan with."""
    planner = Planner(load_demo_profile(), request.steps, storage)
    found = planner.for_speedup(min(float(knob), planner.fastest))
    return accelerate(pipe, found.schedule, storage=storage)


def extrapolated_with_fewer_steps(pipe: Any, request: Request, knob: str) -> AbstractContextManager[Any]:
    """`steps,N,i,start`: the plain sampler's steps are fewer first, and of these some reuse."""
    return block_dance(pipe, request, knob.split(",", 1)[1], Extrapolated())


def share_of_steps(request: Request, knob: str) -> int:
    """Steps out of 30, which the knob begins with, at the request's number of steps."""
    return max(1, round(request.steps * int(knob.split(",")[0]) / 30))


BLOCKDANCE_KNOB = "N, cutoff block, window start"
METHODS = {
    "fewer-steps": Method(
        "steps of 30", ("25", "23", "21", "19", "17", "15", "12"), lambda *_: nullcontext(), steps=share_of_steps
    ),
    "blockdance": Method(
        BLOCKDANCE_KNOB,
        ("2,9,0.4", "2,12,0.4", "3,12,0.4", "2,12,0.25", "4,12,0.4", "3,12,0.25", "4,12,0.25", "6,12,0.1"),
        block_dance,
    ),
    "blockdance-extrapolated": Method(
        BLOCKDANCE_KNOB,
        ("2,12,0.4", "2,12,0.25", "3,12,0.4", "3,12,0.25", "4,12,0.25", "3,12,0.1", "4,12,0.1", "5,12,0.1", "6,12,0.1"),
        partial(block_dance, storage=Extrapolated()),
    ),
    "blockdance-extrapolated-fewer": Method(
        f"steps of 30, {BLOCKDANCE_KNOB}",
        ("27,3,12,0.1", "24,2,12,0.1", "24,3,12,0.1", "21,2,12,0.1", "21,3,12,0.1"),
        extrapolated_with_fewer_steps,
        steps=share_of_steps,
    ),
    "blockdance-quadratic": Method(
        BLOCKDANCE_KNOB, ("2,12,0.4", "2,12,0.25", "3,12,0.25"), partial(block_dance, storage=Extrapolated(points=3))
    ),
    "blockdance-residual": Method(
        BLOCKDANCE_KNOB, ("2,12,0.4", "2,12,0.25", "3,12,0.25"), partial(block_dance, storage=Residual())
    ),
    "blockdance-planned": Method("asked speedup", ("1.32", "1.75", "2.3", "2.5"), planned),
    "blockdance-planned-extrapolated": Method(
        "asked speedup",
        ("1.32", "1.55", "1.82", "2.05", "2.3", "2.45", "2.7"),
        partial(planned, storage=Extrapolated()),
    ),
    "first-block-cache": Method("threshold", ("0.03", "0.05", "0.08", "0.12", "0.2"), first_block_cache),
    "taylorseer": Method("interval, order", ("2,0", "2,1", "3,1", "3,2", "4,1"), taylorseer),
    "pab": Method("range", ("2", "3", "5"), pyramid_attention_broadcast),
    "magcache": Method("threshold", ("0.02", "0.03", "0.04", "0.06", "0.1", "0.15"), mag_cache, prepare=MAGNITUDE_RATIOS),
    "cache-dit": Method(
        "threshold, warm-up of 30",
        ("0.03,3", "0.05,3", "0.08,3", "0.12,3", "0.2,3"),
        cache_dit_threshold,
        package="cache_dit",
    ),
    "cache-dit-mask": Method("mask", ("slow", "medium", "fast", "ultra"), cache_dit_mask, package="cache_dit"),
    "smoothcache": Method(
        "threshold",
        ("0.03", "0.05", "0.1", "0.15"),
        calibrated_smooth_cache,
        prepare=OUTPUT_ERRORS,
        package="SmoothCache",
    ),
}
"""By the names of the command line; each sweep goes from gentle to strong."""
