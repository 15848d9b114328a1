"""Transformers without an adapter: accepted where reuse is exact, refused where it is not."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from blockdance import ReuseConfig, Schedule, UnsupportedModelError, accelerate
from blockdance.adapters import REFUSED, STACKS, blocks_of
from blockdance.selftest import candidate_stacks, proven_stack
from tests.test_adapters import Loop
from tests.toys import (
    Again,
    Around,
    Backwards,
    Beside,
    Heavy,
    Idle,
    Junk,
    LongSkip,
    Pairs,
    Plain,
    Random,
    Remembering,
    Table,
)
from tests.zoo import ZOO, Tiny

SCHEDULE = Schedule.parse("fccrrf", 1)


def toy(build: type[nn.Module]) -> Loop:
    def inputs(batch: int) -> dict[str, Any]:
        return {"hidden_states": torch.ones(batch, 3, 4), "timestep": torch.full((batch,), 500.0)}

    torch.manual_seed(0)
    return Loop(Tiny(build.__name__, build, inputs, num_blocks=4))


def zoo_loop(name: str) -> Loop:
    return Loop(next(tiny for tiny in ZOO if tiny.name == name))


def test_an_unknown_model_that_reuses_exactly_is_accepted() -> None:
    loop = toy(Plain)
    plain = loop()
    with accelerate(loop, SCHEDULE) as trace:
        assert not torch.equal(plain, loop())
        assert trace.kinds == str(SCHEDULE)
        assert trace.block_evaluations == 4 * 4 + 2 * 2
    assert torch.equal(plain, loop())


@pytest.mark.parametrize("build", [LongSkip, Random])
def test_an_unknown_model_that_does_not_is_refused_and_left_alone(build: type[nn.Module]) -> None:
    loop = toy(build)
    classes = [type(module) for module in loop.transformer.modules()]
    with (
        pytest.raises(UnsupportedModelError, match=f"{build.__name__} has no adapter and failed the self-test"),
        accelerate(loop, SCHEDULE),
    ):
        loop()
    assert [type(module) for module in loop.transformer.modules()] == classes


REFUSALS: dict[type[nn.Module], str] = {
    Heavy: r"blocks do \d+% of what runs in a call, so reuse could save little",
    Idle: "what its blocks put out does not matter",
    Around: "its blocks do not run once each",
    Again: "its blocks do not run once each",
    Beside: "did not give the same bits",
}


@pytest.mark.parametrize("build", REFUSALS, ids=lambda build: build.__name__)
def test_the_reason_of_a_refusal_is_what_is_the_matter(build: type[nn.Module]) -> None:
    loop = toy(build)
    with pytest.raises(UnsupportedModelError, match=REFUSALS[build]), accelerate(loop, SCHEDULE):
        loop()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_table_with_most_of_the_parameters_is_not_most_of_what_runs(mode: Any) -> None:
    loop = toy(Table)
    model, inputs = loop.transformer, loop.tiny.inputs(1)
    with mode():
        stack = proven_stack(model, candidate_stacks(model), lambda: model(**inputs))
    assert stack.returns == {"layers": ("hidden_states",)}


def test_blocks_are_chosen_by_their_weight_and_not_by_their_number() -> None:
    loop = toy(Junk)
    with accelerate(loop, SCHEDULE) as trace:
        loop()
    assert trace.block_evaluations == 4 * 4 + 2 * 2


def test_lists_are_put_in_the_order_in_which_they_run() -> None:
    model, inputs = toy(Backwards).transformer, toy(Backwards).tiny.inputs(1)
    stack = proven_stack(model, candidate_stacks(model), lambda: model(**inputs))
    assert [block.module for block in blocks_of(model, stack)] == [*model.first, *model.layers]


def test_streams_of_one_shape_are_told_apart_by_where_they_go() -> None:
    loop = toy(Pairs)
    model, inputs = loop.transformer, loop.tiny.inputs(1)
    stack = proven_stack(model, candidate_stacks(model), lambda: model(**inputs))
    assert stack.returns == {"layers": ("context", "x")}
    assert blocks_of(model, stack)[0].image == 1


def test_a_model_that_takes_and_returns_lists_of_tensors_is_proven() -> None:
    model = zoo_loop("ZImageTransformer2DModel").transformer
    pictures, words = torch.randn(2, 4, 1, 8, 8), torch.randn(2, 7, 16)

    def call() -> Any:
        return ZImageTransformer2DModel.forward(model, list(pictures), torch.tensor([0.5, 0.5]), list(words))

    blocks = blocks_of(model, proven_stack(model, candidate_stacks(model), call))
    assert {id(block.module) for block in blocks} > {id(layer) for layer in model.layers}


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "SD3Transformer2DModel", "WanTransformer3DModel"])
def test_without_its_adapter_a_known_model_gives_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = zoo_loop(name)
    with accelerate(loop, SCHEDULE):
        expected = loop()
    monkeypatch.delitem(STACKS, name)
    with accelerate(loop, SCHEDULE):
        assert torch.equal(expected, loop())


def test_long_skip_connections_are_refused_by_name_and_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = zoo_loop("HunyuanDiT2DModel")
    with pytest.raises(UnsupportedModelError, match="long skip connections"), accelerate(loop, ReuseConfig()):
        pass
    monkeypatch.delitem(REFUSED, "HunyuanDiT2DModel")
    with pytest.raises(UnsupportedModelError, match="failed the self-test"), accelerate(loop, SCHEDULE):
        loop()


def test_what_is_wrong_with_the_call_itself_is_said_as_it_is() -> None:
    loop = toy(Plain)
    with pytest.raises(RuntimeError, match=r"size of tensor|mat1"), accelerate(loop, SCHEDULE):
        loop.scheduler.set_timesteps(6)
        loop.transformer(torch.ones(1, 3, 5), torch.ones(1))


@pytest.mark.parametrize(("more", "name"), [({"kv_caches": []}, "kv_caches"), ({"kv_cache_mode": "extract"}, "kv_cache_mode")])
def test_a_call_with_a_kv_cache_is_refused_before_the_self_test_touches_it(more: dict[str, Any], name: str) -> None:
    loop = toy(Remembering)
    arguments = loop.tiny.inputs(1)
    with pytest.raises(UnsupportedModelError, match=f"without {name}"), torch.no_grad(), accelerate(loop, SCHEDULE):
        loop.scheduler.set_timesteps(6)
        loop.transformer(**arguments, **more)
    assert not more.get("kv_caches")


def test_a_kv_cache_among_the_positional_arguments_is_found() -> None:
    loop, cache = toy(Remembering), list[Tensor]()
    with pytest.raises(UnsupportedModelError, match="without kv_caches"), accelerate(loop, SCHEDULE):
        loop.scheduler.set_timesteps(6)
        loop.transformer(torch.ones(1, 3, 4), torch.ones(1), cache)
    assert cache == []


def test_every_class_of_diffusers_that_takes_a_kv_cache_is_refused_or_has_an_adapter() -> None:
    transformers = diffusers.models.transformers
    models = [getattr(transformers, name) for name in dir(transformers)]
    classes = [model for model in models if isinstance(model, type) and issubclass(model, nn.Module)]
    parameters = {model.__name__: inspect.signature(model.forward).parameters for model in classes}
    fill = {model for model, names in parameters.items() if any(name.startswith("kv_cache") for name in names)}
    assert "GlmImageTransformer2DModel" in fill and fill <= REFUSED.keys() | STACKS.keys()
