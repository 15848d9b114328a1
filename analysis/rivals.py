"""What a user would pick instead of BlockDance, each behind one small adapter that makes it run correctly on these models."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import (
    CacheMixin,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor

from analysis.experiment import Request, plan, sample
from blockdance import Extrapolated, ReuseConfig, accelerate
from blockdance.accelerate import PAPER
from blockdance.scheduled import depth_of
from blockdance.storage import Residual, StorageRule

ATTENTION_AND_MLP = [r"transformer_blocks\.\d+\.(attn1|attn2|ff)"]
"""What TaylorSeer predicts; its own default matches nothing in DiT and PixArt."""

CALIBRATION_PROMPT = "red apple"
CALIBRATION_SEED = 1000
CALIBRATED: WeakKeyDictionary[Any, dict[Request, list[float]]] = WeakKeyDictionary()
"""MagCache's ratios, by transformer and request."""

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
    transformer.__class__ = with_caches(cls)
    try:
        transformer.enable_cache(config)
        yield
        transformer.disable_cache()
    finally:
        transformer.__dict__.pop("_cache_config", None)
        transformer.__class__ = cls


def block_dance(pipe: Any, request: Request, knob: str, storage: StorageRule = PAPER) -> AbstractContextManager[Any]:
    """`N,i,start`: interval, cutoff block, and where the window starts; it ends at 0.95."""
    interval, cutoff, start = knob.split(",")
    config = ReuseConfig(int(interval), int(cutoff), float(start), 0.95)
    return accelerate(pipe, plan(config, request, depth_of(pipe)), storage=storage)


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
    ratios = calibrated(pipe, request)
    return cached(pipe, MagCacheConfig(threshold=float(knob), num_inference_steps=request.steps, mag_ratios=ratios))


def calibrated(pipe: Any, request: Request) -> list[float]:
    """MagCache's ratios for this model and request, from one run with another prompt, remembered."""
    known = CALIBRATED.setdefault(pipe.transformer, {})
    key = replace(request, prompt=CALIBRATION_PROMPT, seed=CALIBRATION_SEED)
    if key not in known:
        known[key] = magnitude_ratios(pipe, key)
    return known[key]


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
    "first-block-cache": Method("threshold", ("0.03", "0.05", "0.08", "0.12", "0.2"), first_block_cache),
    "taylorseer": Method("interval, order", ("2,0", "2,1", "3,1", "3,2", "4,1"), taylorseer),
    "pab": Method("range", ("2", "3", "5"), pyramid_attention_broadcast),
    "magcache": Method("threshold", ("0.02", "0.06", "0.15"), mag_cache, prepare=calibrated),
}
"""By the names of the command line; each sweep goes from gentle to strong."""
