"""Nothing swapped leaks: whatever is made of a swapped object, by whomever, has the original class."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from blockdance import ReuseConfig, accelerate
from blockdance.swap import Swapped, is_swapped, original_class
from tests.guided import Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)


def blocks_of(pipe: Guided) -> Any:
    return pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks


def test_a_scheduler_made_inside_has_the_original_class(pipe: Guided) -> None:
    original: Any = type(pipe.scheduler)
    with accelerate(pipe, REUSING), ThreadPoolExecutor(1) as threads:
        pipe()
        made = [
            pipe.scheduler.from_config(pipe.scheduler.config, shift=5.0),
            type(pipe.scheduler).from_config(pipe.scheduler.config),
            type(pipe.scheduler)(),
            threads.submit(pipe.scheduler.from_config, pipe.scheduler.config).result(),
            pipe.scheduler.__new__(type(pipe.scheduler)),
            copy.copy(pipe.scheduler),
            pickle.loads(pickle.dumps(pipe.scheduler)),
        ]
    assert all(type(one) is original for one in made)
    for one in made[:4]:
        pipe.scheduler = one
        with accelerate(pipe, REUSING) as trace:
            pipe()
        assert trace.kinds == "fffcrcrcrc"


def test_a_model_made_inside_has_the_original_classes(one_of_two: Guided, tmp_path: Path) -> None:
    pipe = one_of_two
    before = [type(module) for module in pipe.transformer.modules()]
    with accelerate(pipe, REUSING):
        pipe()
        assert is_swapped(pipe.transformer)
        pipe.transformer.save_pretrained(tmp_path)
        made = [
            type(pipe.transformer).from_config(pipe.transformer.config),
            pipe.transformer.from_pretrained(tmp_path),
            type(pipe.transformer)(**pipe.transformer.config),
        ]
        block = blocks_of(pipe)[0]
        assert is_swapped(block) and not is_swapped(copy.deepcopy(block))
    assert all([type(module) for module in one.modules()] == before for one in made)


def test_a_class_derived_inside_is_derived_from_the_original(one_of_two: Guided) -> None:
    with accelerate(one_of_two, REUSING):
        derived = type("Mine", (type(one_of_two.scheduler),), {"mine": True})
        made = derived()
    assert made.mine and not isinstance(made, Swapped)
    assert issubclass(original_class(derived), type(one_of_two.scheduler))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_what_fsdp_wraps_inside_stays_wrapped_and_is_swapped_no_more(one_of_two: Guided, tmp_path: Path) -> None:
    pipe = one_of_two
    expected = pipe()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with accelerate(pipe, REUSING):
            pipe()
            for block in blocks_of(pipe):
                fully_shard(block, mesh=mesh)
        classes = [type(block) for block in blocks_of(pipe)]
        assert all(issubclass(cls, FSDPModule) and not issubclass(cls, Swapped) for cls in classes)
        assert torch.equal(expected, pipe())
        fresh = Guided(pipe.tiny)
        fully_shard(blocks_of(fresh)[0], mesh=mesh)
        assert not isinstance(blocks_of(fresh)[0], Swapped)
    finally:
        dist.destroy_process_group()
