"""Rivals from packages of their own (`analysis/requirements-rivals.txt`), made to run correctly on these models."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from analysis.experiment import Request, sample
from analysis.records import BenchError
from analysis.restoring import restored

REQUIREMENTS = "analysis/requirements-rivals.txt"
COMPONENTS = ("attn1", "attn2", "ff")
"""The parts of a block that SmoothCache keeps apart, where a model has them."""


def is_installed(package: str | None) -> bool:
    return package is None or find_spec(package) is not None


def check_installed(package: str | None) -> None:
    """Raise BenchError unless the package, if any, can be imported."""
    if not is_installed(package):
        raise BenchError(f"this method needs {package}; `pip install -r {REQUIREMENTS}` installs it")


@contextmanager
def cache_dit(pipe: Any, **config: Any) -> Iterator[None]:
    """cache-dit's DBCache. It patches the pipeline's class, so it is given one of its own, and leaves attributes, which go."""
    check_installed("cache_dit")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit

    cls = type(pipe)
    known_as = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers."))
    with restored(pipe):
        pipe.__class__ = type(known_as, (cls,), {"__module__": cls.__module__})
        try:
            cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**config))
            yield
            cache_dit.disable_cache(pipe)
        finally:
            pipe.__class__ = cls


def cache_dit_threshold(pipe: Any, request: Request, knob: str) -> Any:
    """`threshold,warm-up`: on the change of the first block's residual, after so many full steps out of 30."""
    threshold, warmup = knob.split(",")
    return cache_dit(
        pipe,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=float(threshold),
        max_warmup_steps=max(1, round(int(warmup) * request.steps / 30)),
        num_inference_steps=request.steps,
    )


def cache_dit_mask(pipe: Any, request: Request, knob: str) -> Any:
    """One of cache-dit's own step masks, by name."""
    check_installed("cache_dit")
    from cache_dit import steps_mask

    return cache_dit(
        pipe,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        steps_computation_mask=steps_mask(total_steps=request.steps, mask_policy=knob),
        steps_computation_policy="static",
        num_inference_steps=request.steps,
    )


@contextmanager
def smooth_cache(pipe: Any, errors: Mapping[str, Tensor], threshold: float) -> Iterator[None]:
    """SmoothCache with a schedule for each part of the blocks. It never resets, and prints on every call: not here."""
    check_installed("SmoothCache")
    with redirect_stdout(StringIO()):
        from SmoothCache import SmoothCacheHelper, smooth_cache_helper
    schedule = {name: smooth_schedule(of_part, threshold) for name, of_part in errors.items()}
    helper = SmoothCacheHelper(pipe.transformer, BasicTransformerBlock, list(schedule), schedule)
    with restored(pipe), patch.object(smooth_cache_helper, "print", lambda *_: None, create=True):
        helper.enable()
        yield
        helper.disable()


def smooth_schedule(errors: Tensor, threshold: float, longest: int = 3) -> list[int]:
    """1 for a step that computes, 0 for one that reuses: until the error since the last computed step passes the threshold.

    Args:
        errors: (steps, steps), of a step against an earlier one.
        threshold: the largest error that is let pass.
        longest: reuse steps in a row at most; the SmoothCache paper's bound.
    """
    schedule, last = [1], 0
    for step in range(1, len(errors)):
        reuse = step - last <= longest and float(errors[step, last]) < threshold
        schedule.append(0 if reuse else 1)
        last = last if reuse else step
    return schedule


def output_errors(pipe: Any, request: Request) -> dict[str, Tensor]:
    """Relative L1 errors (steps, steps) of every part's output against earlier steps, mean over blocks, from one plain run."""
    blocks = pipe.transformer.transformer_blocks
    outputs: dict[str, list[list[Tensor]]] = {name: [] for name in COMPONENTS if getattr(blocks[0], name, None) is not None}
    hooks = []
    for name in outputs:
        for block in blocks:
            kept: list[Tensor] = []
            outputs[name].append(kept)
            hooks.append(getattr(block, name).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.clone())))
    try:
        sample(pipe, request)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack([relative_l1(kept) for kept in several]).mean(dim=0) for name, several in outputs.items()}


def relative_l1(kept: Sequence[Tensor]) -> Tensor:
    """(steps, steps): entry [t, s] is how far output t is from output s, over the length of t."""
    flat = torch.stack([one.flatten() for one in kept])
    return torch.cdist(flat, flat, p=1) / flat.abs().sum(dim=1, keepdim=True)
