"""Other caches beside BlockDance: refused at entry or at the first call, however they were switched on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)

from blockdance import BlockDanceConfig, ReuseConfig, SessionError, accelerate, apply_block_dance
from tests.guided import MODELS, Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
CACHING = ("WanTransformer3DModel", "FluxTransformer2DModel")
Switch = Callable[[Any], None]


def first_block(model: Any) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.5))


def taylorseer(model: Any) -> None:
    attention = [r".*blocks\.\d+\.attn.*"]
    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, cache_identifiers=attention)
    apply_taylorseer_cache(model, config)


def mag_cache(model: Any) -> None:
    apply_mag_cache(model, MagCacheConfig(num_inference_steps=10, mag_ratios=[1.0] * 10))


def broadcast(model: Any) -> None:
    apply_pyramid_attention_broadcast(
        model,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 900),
            current_timestep_callback=lambda: 500,
        ),
    )  # fmt: skip


def by_enable_cache(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def as_cache_dit(model: Any) -> None:
    model._is_cached = True


def as_a_package_that_replaces_forward(model: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("never called")

    forward.__module__ = "SmoothCache.diffuser_cache_helper"
    next(model.children()).forward = forward


SWITCHES: list[Switch] = [
    first_block, taylorseer, mag_cache, broadcast, by_enable_cache, as_cache_dit, as_a_package_that_replaces_forward,
]  # fmt: skip


@pytest.fixture(params=CACHING)
def pipe(request: pytest.FixtureRequest) -> Guided:
    return Guided(next(tiny for tiny in MODELS if tiny.name == request.param))


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
def test_a_cache_that_is_on_is_refused_at_entry(pipe: Guided, switch: Switch) -> None:
    switch(pipe.transformer)
    with pytest.raises(SessionError, match="another cache"), accelerate(pipe, REUSING):
        pass
    with pytest.raises(SessionError, match="another cache"):
        apply_block_dance(pipe.transformer, BlockDanceConfig(num_steps=10))


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
def test_a_cache_switched_on_inside_is_refused_before_anything_runs(pipe: Guided, switch: Switch) -> None:
    with accelerate(pipe, REUSING) as trace:
        pipe()
        switch(pipe.transformer)
        with pytest.raises(SessionError, match="another cache"):
            pipe()
    assert len(trace.steps) == 10


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.__name__)
def test_a_cache_switched_on_after_applying_is_refused(pipe: Guided, switch: Switch) -> None:
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0.3, 1.0, num_steps=10))
    pipe()
    applied.reset()
    switch(pipe.transformer)
    with pytest.raises(SessionError, match="another cache"):
        pipe()


def test_hooks_that_skip_nothing_are_welcome(pipe: Guided) -> None:
    class Watching(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Watching.calls += 1
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Watching(), "watching")
    with accelerate(pipe, REUSING) as trace:
        assert pipe().isfinite().all()
    assert trace.kinds == "fffcrcrcrc" and Watching.calls == 20


def test_cache_dit_is_refused_if_it_is_there(pipe: Guided) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    from cache_dit import BlockAdapter, ForwardPattern

    is_flux = hasattr(pipe.transformer, "single_transformer_blocks")
    blocks = pipe.transformer.transformer_blocks if is_flux else pipe.transformer.blocks
    pattern = ForwardPattern.Pattern_1 if is_flux else ForwardPattern.Pattern_3
    adapter = BlockAdapter(transformer=pipe.transformer, blocks=blocks, forward_pattern=pattern, check_forward_pattern=False)
    cache_dit.enable_cache(adapter)
    try:
        with pytest.raises(SessionError, match="another cache"), accelerate(pipe, REUSING):
            pass
    finally:
        cache_dit.disable_cache(adapter)
    with torch.no_grad(), accelerate(pipe, REUSING) as trace:
        pipe()
    assert trace.kinds == "fffcrcrcrc"
