"""`apply_block_dance` and `integrate`: BlockDance on a transformer alone, and as one of diffusers' own caches."""

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig
from torch import Tensor, nn

from blockdance import (
    BlockDanceConfig,
    BlockDanceError,
    ConfigError,
    ReuseConfig,
    Schedule,
    ScheduleError,
    SessionError,
    UnsupportedModelError,
    accelerate,
    apply_block_dance,
    fixed_schedule,
    integrate,
    observe,
)
from blockdance.adapters import REFUSED
from tests.test_adapters import Loop, ran_blocks
from tests.test_selftest import LongSkip, Plain, toy
from tests.tiny import CASES, Case, run_pixart
from tests.zoo import ZOO

ENDLESS = BlockDanceConfig(2, 1, window_start=0, window_end=1)


@pytest.fixture(params=[tiny for tiny in ZOO if tiny.name not in REFUSED], ids=lambda tiny: tiny.name)
def loop(request: pytest.FixtureRequest) -> Loop:
    return Loop(request.param)


@pytest.fixture
def flux() -> Loop:
    return Loop(next(tiny for tiny in ZOO if tiny.name == "FluxTransformer2DModel"))


@pytest.fixture
def sd3() -> Loop:
    return Loop(next(tiny for tiny in ZOO if tiny.name == "SD3Transformer2DModel"))


@pytest.fixture
def integrated() -> Iterator[None]:
    undo = integrate()
    yield
    undo()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def calls(loop: Loop, count: int, **changes: Any) -> list[Tensor]:
    """Outputs of equal calls that differ in nothing but what `changes` says."""
    inputs = loop.tiny.inputs(1) | changes
    with torch.no_grad():
        return [loop.transformer(**inputs, return_dict=False)[0] for _ in range(count)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pipeline_gives_the_same_bits_as_with_accelerate(case: Case) -> None:
    pipe = case.build()
    before, plain = classes(pipe.transformer), case.run(pipe)
    with accelerate(pipe, ReuseConfig(2, 3)):
        expected = case.run(pipe)
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 3, num_steps=10))
    for _ in range(2):
        assert torch.equal(expected, case.run(pipe))
    applied.remove()
    applied.remove()
    assert classes(pipe.transformer) == before
    assert torch.equal(plain, case.run(pipe))


def test_every_adapter_runs_exactly_the_tail_on_reuse_steps(loop: Loop) -> None:
    ran, depth = ran_blocks(loop), loop.tiny.num_blocks
    plain = loop()
    ran.clear()
    applied = apply_block_dance(loop.transformer, BlockDanceConfig(3, 1, 0.3, 1.0, num_steps=6))
    assert not torch.equal(plain, loop())
    expected = fixed_schedule(ReuseConfig(3, 1, 0.3, 1.0), 6, depth)
    assert str(expected) == "ffcrrc"
    assert len(ran) == expected.block_evaluations(depth)
    applied.remove()
    assert torch.equal(plain, loop())


def test_without_a_total_model_calls_are_counted(flux: Loop) -> None:
    ran = ran_blocks(flux)
    apply_block_dance(flux.transformer, ENDLESS)
    outputs = calls(flux, 4)
    assert len(ran) == 5 + 3 + 5 + 3
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_a_reuse_config_is_one_without_a_number_of_steps(flux: Loop) -> None:
    ran = ran_blocks(flux)
    apply_block_dance(flux.transformer, ReuseConfig(2, 1, 0, 1))
    calls(flux, 2)
    assert len(ran) == 5 + 3


def test_interval_one_never_reuses(flux: Loop) -> None:
    ran = ran_blocks(flux)
    apply_block_dance(flux.transformer, BlockDanceConfig(1, 1, 0, 1))
    calls(flux, 3)
    assert len(ran) == 15


def test_a_window_needs_the_number_of_steps(flux: Loop) -> None:
    apply_block_dance(flux.transformer, BlockDanceConfig())
    with pytest.raises(ScheduleError, match=r"num_steps is needed to place the window 0.4 to 0.95"):
        calls(flux, 1)


def test_branches_are_told_apart_by_their_contexts(flux: Loop) -> None:
    ran = ran_blocks(flux)
    apply_block_dance(flux.transformer, ENDLESS)
    outputs: list[Tensor] = []
    for _ in range(2):
        for name in ("cond", "uncond"):
            with flux.transformer.cache_context(name):
                outputs += calls(flux, 1, hidden_states=torch.full((1, 16, 4), float(len(name))))
    assert len(ran) == 5 + 5 + 3 + 3
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("same_object", [True, False])
def test_branches_without_contexts_are_told_apart_by_their_texts(sd3: Loop, same_object: bool) -> None:
    ran = ran_blocks(sd3)
    texts = [torch.randn(1, 5, 16), torch.randn(1, 5, 16)]
    apply_block_dance(sd3.transformer, ENDLESS)
    outputs = [
        calls(sd3, 1, encoder_hidden_states=text if same_object else text.clone())[0] for _ in range(2) for text in texts
    ]
    assert len(ran) == 4 + 4 + 2 + 2
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_a_text_that_is_never_the_same_is_never_reused_and_memory_stays_flat(sd3: Loop) -> None:
    ran = ran_blocks(sd3)
    applied = apply_block_dance(sd3.transformer, ENDLESS)
    for _ in range(30):
        calls(sd3, 1, encoder_hidden_states=torch.randn(1, 5, 16))
    assert len(ran) == 30 * 4
    assert len(applied.session()._reuser.stored) <= 8


def test_a_step_index_is_believed(flux: Loop) -> None:
    ran, kinds = ran_blocks(flux), []
    apply_block_dance(flux.transformer, BlockDanceConfig(2, 1, 0.5, 1.0, num_steps=8))
    for index in (0, 4, 5, 6, 7, 5, 6, 7):  # the second run starts late, as image-to-image does
        ran.clear()
        with flux.transformer.cache_context("cond", step_index=index):
            calls(flux, 1)
        kinds.append(len(ran))
    assert kinds == [5, 5, 3, 5, 3, 5, 5, 3]  # and has nothing to reuse at first
    with (
        pytest.raises(ScheduleError, match="at step 9, but num_steps is 8"),
        flux.transformer.cache_context("cond", step_index=9),
    ):
        calls(flux, 1)


@pytest.mark.parametrize("moments", [(900.0, 600.0, 300.0), (0.1, 0.4, 0.7)])
def test_a_run_cut_short_leaves_nothing_to_the_next(flux: Loop, moments: tuple[float, ...]) -> None:
    first = apply_block_dance(flux.transformer, ENDLESS)
    with torch.no_grad():
        for moment in moments:  # the last is a cache step
            flux.predict(torch.ones(1, 16, 4), torch.tensor(moment), flux.tiny.inputs(1))
        begun_anew = flux.predict(torch.zeros(1, 16, 4), torch.tensor(moments[0]), flux.tiny.inputs(1))
        first.remove()
        plain = flux.predict(torch.zeros(1, 16, 4), torch.tensor(moments[0]), flux.tiny.inputs(1))
    assert torch.equal(begun_anew, plain)


def test_an_exception_a_reset_and_the_end_of_a_pipeline_begin_a_new_run() -> None:
    case = CASES[1]
    pipe = case.build()
    inputs = case.inputs(1)
    ran: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    applied = apply_block_dance(pipe.transformer, ENDLESS)
    with torch.no_grad():
        for between in (applied.reset, pipe.maybe_free_model_hooks, lambda: failing_call(pipe.transformer, inputs)):
            ran.clear()
            pipe.transformer(**inputs)
            between()
            pipe.transformer(**inputs)
            assert len(ran) == 2
            applied.reset()


def failing_call(transformer: nn.Module, inputs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        transformer(**inputs | {"encoder_hidden_states": torch.randn(1, 5, 3)})


def test_another_batch_or_size_is_never_given_a_stored_tensor(sd3: Loop) -> None:
    apply_block_dance(sd3.transformer, ENDLESS)
    text = sd3.tiny.inputs(1)["encoder_hidden_states"]
    calls(sd3, 1)
    other = calls(sd3, 1, hidden_states=torch.randn(1, 4, 4, 4))[0]
    assert other.shape == (1, 4, 4, 4)
    with torch.no_grad():
        inputs = sd3.tiny.inputs(2) | {"encoder_hidden_states": text.expand(2, -1, -1)}
        assert len(sd3.transformer(**inputs).sample) == 2


def test_with_gradients_every_block_runs(flux: Loop) -> None:
    ran = ran_blocks(flux)
    apply_block_dance(flux.transformer, ENDLESS)
    inputs = flux.tiny.inputs(1)
    for _ in range(2):
        flux.transformer(**inputs).sample.sum().backward()
    assert len(ran) == 10


def test_a_copy_and_a_saved_model_are_plain(flux: Loop, tmp_path: Path) -> None:
    before = classes(flux.transformer)
    apply_block_dance(flux.transformer, ENDLESS)
    assert classes(copy.deepcopy(flux.transformer)) == before
    flux.transformer.save_pretrained(tmp_path)
    assert classes(before[0].from_pretrained(tmp_path)) == before  # type: ignore[attr-defined]


def test_a_dropped_model_is_freed(flux: Loop) -> None:
    apply_block_dance(flux.transformer, ENDLESS)
    calls(flux, 2)
    gone = weakref.ref(flux.transformer)
    del flux.transformer
    gc.collect()
    assert gone() is None


def test_four_threads_on_one_model_each_have_their_own_run() -> None:
    pipe = CASES[1].build()
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 3, 0.2, 1.0, num_steps=10))
    alone = [run_pixart(copy.copy(pipe), seed=seed) for seed in range(4)]

    def run(seed: int) -> Tensor:
        own = copy.copy(pipe)
        own.scheduler = copy.deepcopy(pipe.scheduler)
        return run_pixart(own, seed=seed)

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, range(4)))
    applied.remove()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_steps", [0, 2.5, "6", True])
def test_a_number_of_steps_that_is_none_is_refused(num_steps: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_steps must be None or an integer of at least 1, got {num_steps!r}"):
        BlockDanceConfig(num_steps=num_steps)


def test_an_unknown_model_passes_the_self_test_or_is_refused() -> None:
    good, bad = toy(Plain), toy(LongSkip)
    apply_block_dance(good.transformer, ENDLESS)
    calls(good, 2)
    applied = apply_block_dance(bad.transformer, ENDLESS)
    with pytest.raises(UnsupportedModelError, match="failed the self-test"):
        calls(bad, 1)
    applied.remove()
    assert classes(bad.transformer)[0] is LongSkip


def test_what_cannot_be_applied_is_refused_in_a_sentence(flux: Loop) -> None:
    with pytest.raises(UnsupportedModelError, match=r"takes a transformer, got Loop; pass pipe.transformer"):
        apply_block_dance(flux, ENDLESS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config must be a BlockDanceConfig, got Schedule"):
        apply_block_dance(flux.transformer, Schedule.parse("cr", 1))  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"cutoff_block must be in \[0, 3\] for 5 blocks, got 4"):
        apply_block_dance(flux.transformer, BlockDanceConfig(2, 4))
    with observe(flux), pytest.raises(SessionError, match="accelerated or observed just now"):
        apply_block_dance(flux.transformer, ENDLESS)
    apply_block_dance(flux.transformer, ENDLESS)
    with pytest.raises(SessionError, match="accelerated already by apply_block_dance"):
        apply_block_dance(flux.transformer, ENDLESS)
    with (
        pytest.raises(SessionError, match="accelerated already by apply_block_dance"),
        accelerate(flux, Schedule.parse("cr", 1)),
    ):
        pass


# What diffusers' CacheTesterMixin asks of a cache, asked of every adapter.


@pytest.mark.usefixtures("integrated")
class TestCacheOfDiffusers:
    def test_enable_and_disable(self, loop: Loop) -> None:
        before = classes(loop.transformer)
        assert not loop.transformer.is_cache_enabled
        loop.transformer.enable_cache(ENDLESS)
        assert loop.transformer.is_cache_enabled
        assert classes(loop.transformer) != before
        loop.transformer.disable_cache()
        assert not loop.transformer.is_cache_enabled
        assert classes(loop.transformer) == before

    def test_enabling_twice_is_an_error(self, loop: Loop) -> None:
        loop.transformer.enable_cache(ENDLESS)
        with pytest.raises(ValueError, match="Caching has already been enabled"):
            loop.transformer.enable_cache(ENDLESS)

    def test_a_second_pass_uses_the_cache(self, loop: Loop) -> None:
        latent = loop.tiny.inputs(1)[loop.tiny.latent]
        loop.transformer.enable_cache(ENDLESS)
        with loop.transformer.cache_context("cache_test"):
            first = calls(loop, 1)[0]
            second = calls(loop, 1, **{loop.tiny.latent: latent + 0.1 * torch.randn_like(latent)})[0]
        loop.transformer.disable_cache()
        assert torch.equal(first, second)
        assert not torch.equal(first, calls(loop, 1, **{loop.tiny.latent: latent + 0.1})[0])

    def test_contexts_are_isolated(self, loop: Loop) -> None:
        ran = ran_blocks(loop)
        loop.transformer.enable_cache(ENDLESS)
        outputs: list[Tensor] = []
        for name in ("context_1", "context_2"):
            with loop.transformer.cache_context(name):
                outputs += calls(loop, 1)
        assert torch.equal(*outputs)
        assert len(ran) == 2 * loop.tiny.num_blocks

    def test_a_reset_begins_anew(self, loop: Loop) -> None:
        ran = ran_blocks(loop)
        loop.transformer.enable_cache(ENDLESS)
        for _ in range(2):
            with loop.transformer.cache_context("context"):
                calls(loop, 1)
            loop.transformer._reset_stateful_cache()
        assert len(ran) == 2 * loop.tiny.num_blocks


@pytest.mark.usefixtures("integrated")
def test_diffusers_own_caches_work_as_before(flux: Loop, sd3: Loop) -> None:
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert flux.transformer.is_cache_enabled
    with pytest.raises(SessionError, match="another cache enabled; call its disable_cache first"), accelerate(flux, ENDLESS):
        pass
    with pytest.raises(SessionError, match="another cache enabled"):
        apply_block_dance(flux.transformer, ENDLESS)
    flux.transformer.disable_cache()
    assert not flux.transformer.is_cache_enabled
    with pytest.raises(BlockDanceError, match="SD3Transformer2DModel has none of diffusers' own caches"):
        sd3.transformer.enable_cache(FirstBlockCacheConfig())
    with sd3.transformer.cache_context("cond"):
        calls(sd3, 1)


def test_integrate_is_undone_and_twice_is_once(flux: Loop, sd3: Loop) -> None:
    undo, undo_again = integrate(), integrate()
    undo_again()
    assert hasattr(sd3.transformer, "enable_cache")
    undo()
    assert type(flux.transformer).enable_cache.__module__ == CacheMixin.__module__
    assert not hasattr(sd3.transformer, "enable_cache")


def test_pipelines_of_models_without_caches_use_it(integrated: None) -> None:
    for case in CASES:
        pipe = case.build()
        with accelerate(pipe, ReuseConfig(2, 3)):
            expected = case.run(pipe)
        pipe.transformer.enable_cache(BlockDanceConfig(2, 3, num_steps=10))
        assert torch.equal(expected, case.run(pipe))
        pipe.transformer.disable_cache()
