"""What users already do with their pipelines: offloading, lower precision, adapters, compiled blocks, attention backends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate as hugging_face
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from blockdance import BlockDanceConfig, ReuseConfig, Schedule, UnsupportedModelError, accelerate, apply_block_dance, observe
from tests.tiny import BLOCKS, CASES, Case

SCHEDULE = Schedule.parse("fccrrcrrfr", 3)
OTHER = Schedule.parse("fccrrcrrfr", 1)
CPU = torch.device("cpu")


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def classes(pipe: Any) -> list[type]:
    return [type(module) for module in pipe.transformer.modules()]


def reused(pipe: Any, case: Case, schedule: Schedule = SCHEDULE) -> Tensor:
    with accelerate(pipe, schedule) as trace:
        picture = case.run(pipe)
    assert trace.kinds == str(schedule)
    assert trace.block_evaluations == schedule.block_evaluations(BLOCKS)
    return picture


# Offloading


def offloaded_one_by_one(pipe: Any) -> Callable[[], None]:
    """As `enable_sequential_cpu_offload`: weights come in for each submodule's call, and leave after it."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    for model in models:
        hugging_face.cpu_offload(model, execution_device=CPU)

    def remove() -> None:
        for model in models:
            remove_hook_from_module(model, recurse=True)

    return remove


def offloaded_whole(pipe: Any) -> Callable[[], None]:
    """As `enable_model_cpu_offload`: the model comes in for its call, and leaves when another is called."""
    hugging_face.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)
    return lambda: remove_hook_from_module(pipe.transformer, recurse=True)


def offloaded_in_groups(kind: str) -> Callable[[Any], Callable[[], None]]:
    def offload(pipe: Any) -> Callable[[], None]:
        blocks: dict[str, Any] = {"num_blocks_per_group": 2} if kind == "block_level" else {}
        apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)
        return lambda: None

    return offload


OFFLOADS = {
    "sequential": offloaded_one_by_one,
    "model": offloaded_whole,
    "groups of blocks": offloaded_in_groups("block_level"),
    "groups of leaves": offloaded_in_groups("leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloading_before_changes_no_bit(case: Case, offload: Any) -> None:
    pipe = case.build()
    plain, expected = case.run(pipe), reused(pipe, case)
    remove = offload(pipe)
    before = classes(pipe)
    assert torch.equal(expected, reused(pipe, case))
    assert classes(pipe) == before
    assert torch.equal(plain, case.run(pipe))
    remove()
    assert torch.equal(expected, reused(pipe, case))


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_offloading_put_on_and_off_inside_changes_no_bit(case: Case, offload: Any) -> None:
    pipe = case.build()
    before, plain, expected = classes(pipe), case.run(pipe), reused(pipe, case)
    with accelerate(pipe, SCHEDULE):
        case.run(pipe)
        remove = offload(pipe)
        assert torch.equal(expected, case.run(pipe))
        remove()
        assert torch.equal(expected, case.run(pipe))
    assert torch.equal(plain, case.run(pipe))
    assert classes(pipe) == before


def test_hooks_put_on_inside_stay_when_leaving() -> None:
    case = CASES[1]
    pipe = case.build()
    plain = case.run(pipe)
    with accelerate(pipe, SCHEDULE):
        case.run(pipe)
        offloaded_one_by_one(pipe)
    assert next(pipe.transformer.parameters()).is_meta  # out of the way until it is called
    assert torch.equal(plain, case.run(pipe))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = CASES[1]
    pipe = case.build()
    with accelerate(pipe, SCHEDULE) as single:
        case.run(pipe)
    pipe.to(dtype)
    plain = case.run(pipe)
    with accelerate(pipe, ReuseConfig(1)):
        assert torch.equal(plain, case.run(pipe))
    with accelerate(pipe, SCHEDULE) as half:
        assert case.run(pipe).isfinite().all()
    assert single.cache_bytes == 2 * half.cache_bytes
    with observe(pipe) as observation:
        case.run(pipe)
    assert observation.cosine().dtype == torch.float32
    assert (observation.cosine()[:, 1:].abs() <= 1.001).all()


# Adapters


class LowRank(nn.Module):
    """A linear layer with a low-rank term beside it, as LoRA puts it in the layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def with_lora(pipe: Any) -> None:
    torch.manual_seed(1)
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_q = LowRank(block.attn1.to_q)


def test_lora_put_on_before_or_between_runs(case: Case) -> None:
    pipe = case.build()
    plain = case.run(pipe)
    with accelerate(pipe, SCHEDULE):
        case.run(pipe)
        with_lora(pipe)
        between = case.run(pipe)
    lora = case.run(pipe)
    assert not torch.equal(plain, lora)
    assert torch.equal(between, reused(pipe, case))
    with accelerate(pipe, ReuseConfig(1)):
        assert torch.equal(lora, case.run(pipe))


# Compilation, with a backend that counts graphs and runs them as they are


@pytest.fixture
def graphs() -> Iterator[CompileCounter]:
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


def test_compiled_blocks_are_not_compiled_again(case: Case, graphs: CompileCounter) -> None:
    pipe = case.build()
    plain, expected = case.run(pipe), reused(pipe, case)
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend=graphs)
    assert torch.allclose(plain, case.run(pipe), atol=1e-5)
    once = reused(pipe, case)
    assert torch.allclose(expected, once, atol=1e-5)
    after_one_run = graphs.frame_count
    assert after_one_run > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(once, reused(pipe, case))
        reused(pipe, case, OTHER)
        case.run(pipe)
        with observe(pipe):
            case.run(pipe)
    assert graphs.frame_count == after_one_run


def test_a_transformer_compiled_as_a_whole_is_not_compiled_again(case: Case, graphs: CompileCounter) -> None:
    """Steps before the first cache step run its graph; from there on its blocks run, each with its own graph if it has one."""
    pipe = case.build()
    plain, expected = case.run(pipe), reused(pipe, case)
    pipe.transformer.compile(backend=graphs)
    assert torch.allclose(plain, case.run(pipe), atol=1e-5)
    once = reused(pipe, case)
    assert torch.allclose(expected, once, atol=1e-5)
    after_one_run = graphs.frame_count
    assert after_one_run == 2  # one graph, and once more as the model's class is another inside
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(once, reused(pipe, case))
        reused(pipe, case, OTHER)
        case.run(pipe)
    assert graphs.frame_count == after_one_run


def test_an_applied_transformer_that_is_compiled(graphs: CompileCounter) -> None:
    case = CASES[1]
    pipe = case.build()
    with accelerate(pipe, ReuseConfig(2, 3)):
        expected = case.run(pipe)
    pipe.transformer.compile(backend=graphs)
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 3, num_steps=10))
    assert torch.allclose(expected, case.run(pipe), atol=1e-5)
    applied.remove()
    assert case.run(pipe).isfinite().all()


def test_the_wrapper_of_torch_compile_is_refused_with_the_way_out() -> None:
    pipe = CASES[1].build()
    object.__setattr__(pipe, "transformer", torch.compile(pipe.transformer, backend="eager"))
    with (
        pytest.raises(UnsupportedModelError, match=r"use transformer.compile\(\), or compile the blocks"),
        accelerate(pipe, SCHEDULE),
    ):
        pass


# What the device sees


class Syncs(TorchDispatchMode):
    """Counts operations whose result the host waits for, which a CUDA graph cannot hold."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.name()
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "aten::equal", "is_nonzero", "unique"))
        return operation(*args, **(kwargs or {}))


def syncs_of(pipe: Any, case: Case) -> int:
    with Syncs() as syncs:
        case.run(pipe)
    return syncs.count


def test_a_run_with_reuse_never_waits_for_the_device_more_than_the_plain_one(case: Case) -> None:
    pipe = case.build()
    plain = syncs_of(pipe, case)
    with accelerate(pipe, SCHEDULE):
        assert syncs_of(pipe, case) == plain


# Attention


@contextmanager
def counted_attention(pipe: Any) -> Iterator[list[int]]:
    """Every block's self-attention goes through a processor of the user's."""
    called: list[int] = []

    class Counting(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return super().__call__(*args, **kwargs)

    for block in pipe.transformer.transformer_blocks:
        block.attn1.set_processor(Counting())
    yield called


def test_the_users_attention_is_the_one_that_runs(case: Case) -> None:
    pipe = case.build()
    with counted_attention(pipe) as called:
        reused(pipe, case)
        assert len(called) == SCHEDULE.block_evaluations(BLOCKS)
        called.clear()
        case.run(pipe)
        assert len(called) == BLOCKS * len(SCHEDULE)
