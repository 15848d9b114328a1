"""What a block takes and returns: streams by what they are, through whatever is wrapped around it, and whose rows are whose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from blockdance import Schedule, UnsupportedModelError, accelerate
from blockdance.adapters import REFUSED, STACKS, Block, Stack, blocks_of, guidance_rows, has_null_half, parameter_names
from blockdance.selftest import candidate_stacks, flaw_of, proven_stack, tensors_in
from tests.test_adapters import REUSING, Loop
from tests.zoo import ZOO, Tiny

EVERY = [tiny for tiny in ZOO if tiny.name not in REFUSED]
BY_NAME = {tiny.name: tiny for tiny in EVERY}
TOO_SMALL = "HunyuanVideo15Transformer3DModel"
"""One layer of fixed size does most of the work in a tiny one."""


def known_blocks(tiny: Tiny, model: nn.Module) -> list[Block]:
    return blocks_of(model, STACKS[tiny.name])


def found_blocks(tiny: Tiny, model: nn.Module) -> list[Block]:
    """As if the class had no adapter."""
    inputs = tiny.inputs(2)
    return blocks_of(model, proven_stack(model, candidate_stacks(model), lambda: model(**inputs)))


def streams_into(blocks: list[Block], model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """What each block is given in one call of the model."""
    seen: dict[int, tuple[Tensor, ...]] = {}

    def note(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.update({index: blocks[index].inputs(args, kwargs)})

    hooks = [block.module.register_forward_pre_hook(note(index), with_kwargs=True) for index, block in enumerate(blocks)]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [seen[index] for index in range(len(blocks))]


KNOWN = [pytest.param(tiny, known_blocks, id=tiny.name) for tiny in EVERY]
FOUND = [pytest.param(tiny, found_blocks, id=f"{tiny.name} unknown") for tiny in EVERY if tiny.name != TOO_SMALL]


@pytest.mark.parametrize(("tiny", "blocks_for"), KNOWN + FOUND)
def test_the_image_stream_is_the_one_that_the_latent_goes_into(tiny: Tiny, blocks_for: Any) -> None:
    model, inputs = tiny.build(), tiny.inputs(2)
    blocks = blocks_for(tiny, model)
    streams = streams_into(blocks, model, inputs)
    others = streams_into(blocks, model, inputs | {tiny.latent: inputs[tiny.latent] + 1})
    changed = [not torch.equal(one, other) for one, other in zip(streams[0], others[0], strict=True)]
    assert changed == [stream == blocks[0].image for stream in range(len(changed))]
    for block, given in zip(blocks, streams, strict=True):
        tokens = [stream.numel() // stream.shape[-1] for stream in given]
        assert tokens[block.image] == max(tokens) and tokens.count(max(tokens)) == 1


@pytest.mark.parametrize("tiny", [tiny for tiny in EVERY if tiny.name != TOO_SMALL], ids=lambda tiny: tiny.name)
def test_without_its_adapter_the_same_streams_are_found_in_the_same_blocks(tiny: Tiny) -> None:
    model = tiny.build()
    found = {id(block.module): block for block in found_blocks(tiny, model)}
    assert all(found[id(block.module)] == block for block in known_blocks(tiny, model))


def test_of_streams_with_strange_names_the_image_is_known_all_the_same() -> None:
    def image_of(*streams: str, places: tuple[int, ...] = (0, 1)) -> str:
        return streams[Block(nn.Identity(), streams, places).image]

    assert image_of("context", "x") == image_of("x", "c") == "x"
    assert image_of("txt", "img", places=(1, 0)) == image_of("img", "txt") == "img"
    assert image_of("audio_hidden_states", "hidden_states") == "hidden_states"
    assert image_of("second", "first", places=(1, 0)) == "first"


class HandsOn(nn.Module):
    """As torch.nn.parallel wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class Two(HandsOn):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.other = nn.Linear(1, 1)


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend="eager")  # type: ignore[return-value]


def subclassed(block: nn.Module) -> nn.Module:
    """Its class gets a base that hands on whatever it is given."""

    class Handing(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    block.__class__ = Handing
    return block


def patched(block: nn.Module) -> nn.Module:
    """As offloading hooks do."""
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    return block


def twice(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(HandsOn(block))


WRAPS = [checkpoint_wrapper, HandsOn, subclassed, patched, twice, compiled]
MODELS = ["WanTransformer3DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel"]


def wrapped(tiny: Tiny, wrap: Callable[[nn.Module], nn.Module]) -> Loop:
    loop = Loop(tiny)
    for path in STACKS[tiny.name].returns:
        blocks = getattr(loop.transformer, path)
        for index, block in enumerate(blocks):
            blocks[index] = wrap(block)
    return loop


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("is_known", [True, False], ids=["adapter", "self-test"])
def test_wrapped_blocks_are_reused_as_bare_ones_are(
    name: str, wrap: Any, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, loop, schedule = Loop(BY_NAME[name]), wrapped(BY_NAME[name], wrap), Schedule.parse(REUSING, 2)
    with accelerate(bare, schedule) as expected:
        latent = bare()
    if not is_known:
        monkeypatch.delitem(STACKS, name)
    with accelerate(loop, schedule) as trace:
        assert torch.equal(latent, loop())
    assert trace.block_evaluations == expected.block_evaluations < trace.baseline_block_evaluations


def test_the_wrapper_is_the_block_and_its_inside_says_what_it_takes() -> None:
    tiny = BY_NAME["WanTransformer3DModel"]
    model = wrapped(tiny, twice).transformer
    block = blocks_of(model, STACKS[tiny.name])[0]
    assert block.module is model.blocks[0]
    assert parameter_names(block.module) == parameter_names(tiny.build().blocks[0])  # type: ignore[index, arg-type]


def test_a_wrapper_that_hides_what_its_block_takes_is_refused_with_the_reason() -> None:
    tiny = BY_NAME["WanTransformer3DModel"]
    with pytest.raises(UnsupportedModelError, match=r"cannot find hidden_states in a block: Two takes \(\*args, \*\*kwargs\)"):
        blocks_of(wrapped(tiny, Two).transformer, STACKS[tiny.name])


def test_a_list_of_one_block_is_left_to_the_caller_and_one_of_none_is_refused() -> None:
    model = BY_NAME["WanTransformer3DModel"].build()
    stack = STACKS["WanTransformer3DModel"]
    del model.blocks[1:]  # type: ignore[operator, union-attr, index]
    inputs = BY_NAME["WanTransformer3DModel"].inputs(1)
    assert len(blocks_of(model, stack)) == 1
    assert proven_stack(model, candidate_stacks(model), lambda: model(**inputs)) == stack
    del model.blocks[:]  # type: ignore[operator, union-attr, index]
    with pytest.raises(UnsupportedModelError, match="has no blocks whose outputs could be reused"):
        blocks_of(model, stack)
    with pytest.raises(UnsupportedModelError, match="has no list of blocks whose outputs could be reused"):
        candidate_stacks(model)


def test_a_silent_video_is_reused_exactly_where_the_blocks_have_a_stream_of_sound() -> None:
    tiny = BY_NAME["Kandinsky6Transformer3DModel"]
    model, inputs = tiny.build(), tiny.inputs(2)
    del inputs["audio_hidden_states"]
    blocks = known_blocks(tiny, model)
    with torch.no_grad():
        expected = tensors_in(model(**inputs))
        assert flaw_of(blocks, lambda: model(**inputs), expected, {len(blocks) - 2}) is None
    streams = blocks[0].outputs((torch.ones(2, 3, 4), None))
    assert [tuple(stream.shape) for stream in streams] == [(2, 3, 4), (2, 0)]
    assert blocks[0].returning(streams)[1] is None


def rows(branch: int, model_rows: int, sample_rows: int, conditional_first: bool = False) -> dict[str, list[int]]:
    stack = Stack({}, conditional_first=conditional_first)
    found = guidance_rows(nn.Identity(), stack, branch, {}, model_rows, sample_rows)
    return {name: list(range(model_rows))[part] for name, part in found.items()}


def test_every_copy_of_the_pictures_in_a_batch_is_a_guidance_branch() -> None:
    assert rows(0, 2, 2) == {"conditional": [0, 1]}
    assert rows(0, 4, 2) == {"unconditional": [0, 1], "conditional": [2, 3]}
    assert rows(0, 6, 2) == {"unconditional": [0, 1], "conditional": [2, 3], "perturbed": [4, 5]}
    assert rows(0, 4, 1) == {"unconditional": [0], "conditional": [1], "perturbed": [2], "perturbed 2": [3]}
    assert rows(0, 6, 2, True) == {"conditional": [0, 1], "unconditional": [2, 3], "perturbed": [4, 5]}


def test_every_call_of_a_step_is_a_guidance_branch() -> None:
    assert [list(rows(branch, 2, 2)) for branch in range(4)] == [
        ["conditional"], ["unconditional"], ["perturbed"], ["perturbed 2"]
    ]  # fmt: skip


def test_rows_that_do_not_fit_the_latent_are_all_conditional() -> None:
    assert rows(0, 3, 2) == {"conditional": [0, 1, 2]} and rows(0, 2, 0) == {"conditional": [0, 1]}


class Labelled(nn.Module):
    class config:
        num_embeds_ada_norm = 10


def test_null_labels_name_the_halves_and_may_be_looked_at_once_a_run() -> None:
    stack, labels = Stack({}, conditional_first=True), torch.tensor([1, 2, 10, 10])
    halves = {"conditional": slice(0, 2), "unconditional": slice(2, 4)}
    assert guidance_rows(Labelled(), stack, 0, {"class_labels": labels}, 4, 4) == halves
    assert has_null_half(Labelled(), {"class_labels": labels})
    assert not has_null_half(Labelled(), {"class_labels": labels.flip(0)}) and not has_null_half(Labelled(), {})

    class Unread:
        """Labels that nobody may look at."""

    assert guidance_rows(Labelled(), stack, 0, {"class_labels": Unread()}, 4, 4, null_half=True) == halves
    assert list(guidance_rows(Labelled(), stack, 0, {"class_labels": Unread()}, 4, 4, null_half=False)) == ["conditional"]
    assert guidance_rows(Labelled(), stack, 0, {"class_labels": Unread()}, 4, 2) == halves
