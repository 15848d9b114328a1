"""A stored output is good for its own branch of its own run, at the last cache step; every other call runs all blocks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from blockdance import BlockDanceConfig, Extrapolated, ReuseConfig, Schedule, accelerate, apply_block_dance, integrate
from tests.guided import MODELS, TWO, Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
KINDS = "fffcrcrcrc"


@pytest.fixture(params=MODELS, ids=lambda tiny: tiny.name)
def pipe(request: pytest.FixtureRequest) -> Guided:
    return Guided(request.param)


@pytest.fixture(params=TWO, ids=lambda tiny: tiny.name)
def one_of_two(request: pytest.FixtureRequest) -> Guided:
    return Guided(request.param)


def plainly(pipe: Guided, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
    """What the call gives on a model of its own."""
    return Guided(pipe.tiny).predict(latent, timestep, condition)


# Branches


def test_a_branch_that_missed_the_last_cache_step_caches(pipe: Guided) -> None:
    """Guidance is off for steps 4 to 6 and on again at 7, a reuse step, when the last cache step is 6."""
    schedule = Schedule.parse("fccrcrcrcr", 1)
    with accelerate(pipe, schedule) as trace:
        pipe(branches=lambda step: (0,) if 4 <= step <= 6 else (0, 1))
    assert trace.kinds == "fccrcrcccr"
    depth = pipe.tiny.num_blocks
    assert [step.blocks_evaluated for step in trace.steps][5:9] == [depth - 2, depth, 2 * depth - 2, 2 * depth]


@pytest.mark.parametrize("storage", [None, Extrapolated()], ids=["latest", "extrapolated"])
def test_what_a_branch_missed_is_not_bridged_either(one_of_two: Guided, storage: Any) -> None:
    """After its absence a branch starts from what it stored since, as a run that begins with that step would."""
    pipe = one_of_two

    def some(step: int) -> tuple[int, ...]:
        return (0,) if 3 <= step <= 5 else (0, 1)

    with accelerate(pipe, Schedule.parse("fccrcrccrf", 1), storage=storage):
        pipe(branches=some)
    absent = [outputs[-1] for outputs in pipe.outputs]
    with accelerate(pipe, Schedule.parse("fffrccccrf".replace("r", "f", 1), 1), storage=storage):
        pipe(branches=some)
    assert not any(output.isnan().any() for output in absent)


def test_a_branch_that_drops_out_leaves_its_output_to_nobody(pipe: Guided) -> None:
    """Three calls a step; from step 4 on the middle one is left out, and the third must not start from what it stored."""
    pipe = Guided(pipe.tiny, texts=3)
    schedule = Schedule.parse("ffccrfffff", pipe.tiny.num_blocks - 2)

    def third(seed: int) -> Tensor:
        pipe.conditions[1] = pipe.condition(seed)
        with accelerate(pipe, schedule):
            pipe(branches=lambda step: (0, 2) if step >= 4 else (0, 1, 2), after=forget)
        return pipe.outputs[4][1]

    def forget(pipe: Guided, step: int, latent: Tensor) -> None:
        latent.copy_(pipe.latent(step))  # so that the latents do not depend on the texts

    assert torch.equal(third(1), third(77))


def test_branches_may_come_in_another_order(one_of_two: Guided) -> None:
    pipe, schedule = one_of_two, Schedule.parse("fccrcrcrcr", 1)
    with accelerate(pipe, schedule):
        pipe(branches=lambda _: (0, 1))
        expected = pipe.outputs
        pipe(branches=lambda step: (1, 0) if step % 2 else (0, 1))
    for step, (ours, theirs) in enumerate(zip(pipe.outputs, expected, strict=True)):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[::-1] if step % 2 else ours, theirs, strict=True))


def test_a_name_tells_branches_of_one_text_apart() -> None:
    pipe = Guided(next(tiny for tiny in TWO if tiny.name == "WanTransformer3DModel"))
    pipe.conditions = [pipe.conditions[0]] * 2
    predict, names = pipe.predict, iter("abababab" + "ab")

    def named(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        name = next(names)
        with pipe.transformer.cache_context(name):
            return predict(latent if name == "a" else -latent, timestep, condition)

    pipe.predict = named  # type: ignore[method-assign]
    with accelerate(pipe, Schedule.parse("fccrr", 1)) as trace:
        pipe(steps=5, branches=lambda step: (0, 1))
    assert trace.kinds == "fccrr"
    assert not torch.equal(*pipe.outputs[3])


def test_texts_made_anew_for_every_call_are_known_by_their_values(one_of_two: Guided) -> None:
    pipe = one_of_two
    with accelerate(pipe, REUSING):
        expected = pipe()
    predict = pipe.predict

    def anew(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        copies = {name: one.clone() if isinstance(one, Tensor) else one for name, one in condition.items()}
        return predict(latent, timestep, copies)

    pipe.predict = anew  # type: ignore[method-assign]
    with accelerate(pipe, REUSING) as trace:
        assert torch.equal(expected, pipe())
    assert trace.kinds == KINDS


@pytest.mark.parametrize("how", ["another", "in place"])
def test_a_text_switched_in_the_run_makes_its_next_call_a_cache_step(one_of_two: Guided, how: str) -> None:
    pipe = one_of_two

    def switch(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == 3:
            fresh = pipe.condition(9)
            if how == "another":
                pipe.conditions[1] = fresh
            else:
                for name in ("encoder_hidden_states", "y"):
                    if name in fresh:
                        pipe.conditions[1][name].copy_(fresh[name])

    with accelerate(pipe, REUSING) as trace:
        pipe(after=switch)
    assert trace.kinds == KINDS[:4] + "c" + KINDS[5:]


# Calls that are not the run's


def with_accelerate(pipe: Guided) -> AbstractContextManager[Any]:
    return accelerate(pipe, REUSING)


@contextmanager
def with_apply(pipe: Guided) -> Any:
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0.3, 1.0, num_steps=10))
    yield
    applied.remove()


@contextmanager
def with_enable_cache(pipe: Guided) -> Any:
    with ExitStack() as stack:
        stack.callback(integrate())
        pipe.transformer.enable_cache(BlockDanceConfig(2, 1, 0.3, 1.0, num_steps=10))
        stack.callback(pipe.transformer.disable_cache)
        yield


FACES = [with_accelerate, with_apply, with_enable_cache]


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
@pytest.mark.parametrize("same_text", [True, False], ids=["its text", "another text"])
def test_a_preview_in_a_callback_neither_takes_nor_gives(
    one_of_two: Guided, face: Callable[[Guided], AbstractContextManager[Any]], same_text: bool
) -> None:
    pipe, previews = one_of_two, []
    with face(pipe):
        expected = pipe()
    condition = pipe.conditions[0] if same_text else pipe.condition(5)

    def preview(pipe: Guided, step: int, latent: Tensor) -> None:
        timestep = pipe.scheduler.timesteps[step] * 1
        seen = pipe.transformer(**condition | {pipe.tiny.latent: latent, "timestep": timestep.expand(1)}, return_dict=False)[0]
        previews.append((latent, timestep, seen))

    with face(pipe) as trace:
        assert torch.equal(expected, pipe(after=preview))
    assert trace is None or trace.kinds == KINDS
    with torch.no_grad():
        for latent, timestep, seen in previews[1:]:
            assert torch.equal(seen, plainly(pipe, latent, timestep, condition))


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_calls_before_and_after_a_run_are_plain_and_change_nothing(
    one_of_two: Guided, face: Callable[[Guided], AbstractContextManager[Any]]
) -> None:
    pipe = one_of_two
    with face(pipe):
        expected = pipe()
    latent, timestep = pipe.latent(4), torch.tensor(300.0)
    with torch.no_grad():
        plain = plainly(pipe, latent, timestep, pipe.conditions[0])

    def outside() -> Tensor:
        with torch.no_grad():
            inputs = {pipe.tiny.latent: latent, "timestep": timestep.expand(1)}
            found: Tensor = pipe.transformer(**pipe.conditions[0] | inputs, return_dict=False)[0]
            return found

    with face(pipe):
        for _ in range(2):
            assert torch.equal(outside(), plain)
            assert torch.equal(expected, pipe())
        assert torch.equal(outside(), plain)


def test_an_extra_call_by_the_loop_itself_leaves_the_picture_alone(one_of_two: Guided) -> None:
    """It has a branch's text, comes from the same line, and only at a cache step: nobody can tell which of the two it was."""
    pipe = one_of_two
    with accelerate(pipe, Schedule.parse("fffcfcrfff", 1)):
        pipe(branches=lambda step: (0, 0) if step == 5 else (0,))
    twice = pipe.outputs[6][0]
    with accelerate(pipe, Schedule.parse("fffcfccfff", 1)):
        pipe(branches=lambda step: (0, 0) if step == 5 else (0,))
    assert torch.equal(twice, pipe.outputs[6][0])


def test_a_pipeline_that_shares_the_transformer_is_left_plain_in_the_middle_of_a_run(pipe: Guided) -> None:
    twin = Guided(pipe.tiny)
    twin.transformer = pipe.transformer
    plain = twin(seed=7)

    class Stop(Exception):
        pass

    def stop(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == 4:
            raise Stop

    with accelerate(pipe, REUSING):
        with pytest.raises(Stop):
            pipe(after=stop)
        assert torch.equal(plain, twin(seed=7))
    pictures = []
    with accelerate(pipe, REUSING) as trace:
        expected = pipe()
        assert torch.equal(expected, pipe(after=lambda *_: pictures.append(twin(seed=7))))
    assert trace.kinds == KINDS and all(torch.equal(plain, picture) for picture in pictures)


# What is stored


@pytest.mark.parametrize("storage", [None, Extrapolated()], ids=["latest", "extrapolated"])
def test_a_block_that_writes_into_its_output_later_spoils_nothing(one_of_two: Guided, storage: Any) -> None:
    """Block i + 1 overwrites the tensor that block i put out, as blocks that work in place do."""
    pipe = one_of_two

    def run() -> Tensor:
        with accelerate(pipe, REUSING, storage=storage):
            return pipe()

    expected = run()
    blocks = pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks
    forward = blocks[2].forward

    def in_place(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and value.shape[0] == 1:
                value.zero_()
        return result

    assert not torch.equal(expected, pipe())
    before = [condition.copy() for condition in pipe.conditions]
    blocks[2].forward = in_place
    pipe.conditions = before
    spoilt = run()
    assert spoilt.isfinite().all()
    again = run()
    assert torch.equal(spoilt, again)
