"""A stored output is good for its own branch of its own run, at the last cache step; every other call runs all blocks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch import Tensor

from blockdance import BlockDanceConfig, Extrapolated, ReuseConfig, Schedule, accelerate, apply_block_dance, integrate
from blockdance.storage import Residual
from tests.guided import TWO, Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
KINDS = "fffcrcrcrc"


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


def test_what_a_branch_missed_is_not_bridged(one_of_two: Guided) -> None:
    """It was away for the cache steps 4 and 5, so the line through what it stored at 2 and at 7 is not followed."""
    pipe, schedule = one_of_two, Schedule.parse("fccrccrcrf", 1)

    def outputs(storage: Any) -> list[Tensor]:
        with accelerate(pipe, schedule, storage=storage) as trace:
            pipe(branches=lambda step: (0,) if 3 <= step <= 6 else (0, 1), after=forget)
        assert trace.kinds == str(schedule)
        return pipe.outputs[8]

    (latest_0, latest_1), (line_0, line_1) = outputs(None), outputs(Extrapolated())
    assert torch.equal(latest_1, line_1) and not torch.equal(latest_0, line_0)


def forget(pipe: Guided, step: int, latent: Tensor) -> None:
    """The next latent does not depend on anything that ran."""
    latent.copy_(pipe.latent(step))


def test_a_branch_that_drops_out_leaves_its_output_to_nobody(pipe: Guided) -> None:
    """Three calls a step; from step 4 on the middle one is left out, and the third must not start from what it stored."""
    pipe = Guided(pipe.tiny, texts=3)
    schedule = Schedule.parse("ffccrfffff", pipe.tiny.num_blocks - 2)

    def third(seed: int) -> Tensor:
        pipe.conditions[1] = pipe.condition(seed)
        with accelerate(pipe, schedule):
            pipe(branches=lambda step: (0, 2) if step >= 4 else (0, 1, 2), after=forget)
        return pipe.outputs[4][1]

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
    """Both have the same arguments but the latent; at step 3, a reuse step, the first is left out."""
    pipe = Guided(next(tiny for tiny in TWO if tiny.name == "WanTransformer3DModel"))
    pipe.conditions = [pipe.conditions[0], dict(pipe.conditions[0])]
    predict = pipe.predict

    def named(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        is_first = condition is pipe.conditions[0]
        with pipe.transformer.cache_context("first" if is_first else "second"):
            return predict(latent if is_first else -latent, timestep, condition)

    pipe.predict = named  # type: ignore[method-assign]
    with accelerate(pipe, Schedule.parse("fccrf", 1)) as trace:
        pipe(steps=5)
        first, second = pipe.outputs[3]
        pipe(steps=5, branches=lambda step: (1,) if step == 3 else (0, 1))
    assert trace.kinds == "fccrf"
    assert torch.equal(pipe.outputs[3][0], second) and not torch.equal(first, second)


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


Face = Callable[[Guided], AbstractContextManager[Any]]
FACES = [with_accelerate, with_apply, with_enable_cache]


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
@pytest.mark.parametrize("same_text", [True, False], ids=["its text", "another text"])
def test_a_preview_in_a_callback_neither_takes_nor_gives(one_of_two: Guided, face: Face, same_text: bool) -> None:
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
def test_calls_before_and_after_a_run_are_plain_and_change_nothing(one_of_two: Guided, face: Face) -> None:
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


def test_a_pipeline_that_shares_the_transformer_is_left_plain_in_the_middle_of_a_run(one_of_two: Guided) -> None:
    pipe = one_of_two
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


@pytest.mark.parametrize("storage", [None, Extrapolated(), Residual()], ids=["latest", "extrapolated", "residual"])
def test_a_block_that_writes_into_what_it_is_given_spoils_nothing(one_of_two: Guided, storage: Any) -> None:
    """As blocks do that work in place: the tensor that block i put out, and the one that the first block was given."""
    pipe = one_of_two

    def run() -> Tensor:
        with accelerate(pipe, REUSING, storage=storage):
            return pipe()

    expected = run()
    blocks = pipe.transformer.blocks if hasattr(pipe.transformer, "blocks") else pipe.transformer.transformer_blocks
    for index in (0, 2):
        forward = blocks[index].forward

        def in_place(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).zero_()
            return returned

        blocks[index].forward = in_place
    assert torch.equal(expected, run())


# What a fresh pair of eyes broke


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
@pytest.mark.parametrize("start", [0.0, 0.2], ids=["from the start", "later"])
def test_a_guider_that_skips_layers_has_a_branch_of_its_own(face: Face, start: float) -> None:
    """Its third call has the text of the first, the same line and no name; only the hooks on the model tell.

    With the same latent and timestep on every step, each branch must have the same output on every step, full or reused.
    """
    pipe = Guided(next(tiny for tiny in TWO if tiny.name == "WanTransformer3DModel"))
    guider = SkipLayerGuidance(
        guidance_scale=5.0, skip_layer_config=LayerSkipConfig(indices=[3], fqn="blocks"), skip_layer_guidance_start=start,
        skip_layer_guidance_stop=1.0,
    )  # fmt: skip
    texts = tuple(condition["encoder_hidden_states"] for condition in pipe.conditions)
    outputs: dict[str, list[Tensor]] = {}
    latent, moment = pipe.latent(), torch.full((1,), 500.0)
    with torch.no_grad(), face(pipe) as trace:
        pipe.scheduler.set_timesteps(10)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            guider.set_state(step=step, num_inference_steps=10, timestep=timestep)
            for state in guider.prepare_inputs({"encoder_hidden_states": texts}):
                guider.prepare_models(pipe.transformer)
                inputs = {"hidden_states": latent, "encoder_hidden_states": state.encoder_hidden_states, "timestep": moment}
                output = pipe.transformer(**inputs, return_dict=False)[0]
                guider.cleanup_models(pipe.transformer)
                outputs.setdefault(state.__guidance_identifier__, []).append(output)
            pipe.scheduler.step(output, timestep, latent)
    assert len(outputs) == 3 and len({len(several) for several in outputs.values()}) > 1
    assert all(torch.equal(several[0], one) for several in outputs.values() for one in several)
    assert len({several[0].sum().item() for several in outputs.values()}) == 3
    assert trace is None or trace.kinds == KINDS


def test_more_texts_a_step_than_usual_are_all_reused(one_of_two: Guided) -> None:
    pipe = Guided(one_of_two.tiny, texts=12)
    with accelerate(pipe, REUSING) as trace:
        pipe()
    assert trace.kinds == KINDS


def test_many_calls_of_one_text_a_step_are_as_many_branches(one_of_two: Guided) -> None:
    pipe = one_of_two
    with accelerate(pipe, REUSING) as trace:
        pipe(branches=lambda _: (0,) * 12)
    assert trace.kinds == KINDS


def test_guidance_by_a_function_of_its_own_may_begin_late(one_of_two: Guided) -> None:
    pipe = one_of_two
    predict, calls = pipe.predict, [0]

    def guidance(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        inputs = {pipe.tiny.latent: latent, "timestep": timestep.expand(1)}
        output: Tensor = pipe.transformer(**condition | inputs, return_dict=False)[0]
        return output

    def by_two(latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        calls[0] += 1
        return (predict if condition is pipe.conditions[0] else guidance)(latent, timestep, condition)

    pipe.predict = by_two  # type: ignore[method-assign]
    with accelerate(pipe, REUSING) as trace:
        pipe(branches=lambda step: (0, 1) if step >= 3 else (0,))
    depth = pipe.tiny.num_blocks
    assert trace.kinds == KINDS
    assert [step.blocks_total for step in trace.steps] == [depth] * 3 + [2 * depth] * 7


def test_a_callback_that_calls_again_and_again_does_not_become_the_run(one_of_two: Guided) -> None:
    pipe = one_of_two
    with with_apply(pipe):
        expected = pipe()

    def previews(pipe: Guided, step: int, latent: Tensor) -> None:
        for _ in range(5):
            inputs = {pipe.tiny.latent: latent, "timestep": pipe.scheduler.timesteps[step].expand(1)}
            seen.append((latent, pipe.transformer(**pipe.conditions[0] | inputs, return_dict=False)[0], step))

    seen: list[tuple[Tensor, Tensor, int]] = []
    with with_apply(pipe):
        assert torch.equal(expected, pipe(after=previews))
    with torch.no_grad():
        for latent, output, step in seen[5:]:
            assert torch.equal(output, plainly(pipe, latent, pipe.scheduler.timesteps[step], pipe.conditions[0]))


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_applied_a_run_that_was_cancelled_leaves_nothing_to_one_that_begins_later(one_of_two: Guided, stop: int) -> None:
    pipe = Direct(one_of_two.tiny)

    class Stop(Exception):
        pass

    def cancel(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == stop:
            raise Stop

    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0, 1))
    expected = pipe(first=5, seed=3)
    applied.remove()
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0, 1))
    with pytest.raises(Stop):
        pipe(after=cancel, seed=4)
    assert torch.equal(expected, pipe(first=5, seed=3))
    applied.remove()


class Direct(Guided):
    """Hands the scheduler's own timestep on."""

    def predict(self, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        inputs = {self.tiny.latent: latent, "timestep": timestep.expand(1)}
        output: Tensor = self.transformer(**condition | inputs, return_dict=False)[0]
        return output


def test_two_generators_in_turns_have_a_run_each(one_of_two: Guided) -> None:
    pipe = one_of_two

    def steps(seed: int) -> Iterator[Tensor]:
        latent = pipe.latent(seed)
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(6)
        for timestep in scheduler.timesteps:
            inputs = {pipe.tiny.latent: latent, "timestep": timestep.expand(1)}
            with torch.no_grad():
                output = pipe.transformer(**pipe.conditions[0] | inputs, return_dict=False)[0]
            latent = scheduler.step(output, timestep, latent, return_dict=False)[0]
            yield latent

    def applied(*seeds: int) -> list[Tensor]:
        handle = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0, 1))
        latents = list(zip(*(steps(seed) for seed in seeds), strict=True))[-1]
        handle.remove()
        return list(latents)

    assert all(map(torch.equal, applied(1, 2), [*applied(1), *applied(2)]))


def test_a_text_written_in_inference_mode_is_noticed(one_of_two: Guided) -> None:
    pipe = one_of_two

    def write(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == 3:
            pipe.conditions[1]["encoder_hidden_states"].mul_(2)

    with torch.inference_mode():
        pipe.conditions = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in one.items()} for one in pipe.conditions]
        with accelerate(pipe, REUSING) as trace:
            pipe(after=write)
    assert trace.kinds == "fffcccrcrc"


def test_two_pipelines_with_one_transformer_may_both_be_in_force(one_of_two: Guided) -> None:
    pipe = one_of_two
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    other = ReuseConfig(3, 0, 0.2, 1.0)
    with accelerate(pipe, REUSING):
        expected = pipe()
    with accelerate(twin, other):
        theirs = twin(seed=2)
    pictures = []
    with accelerate(pipe, REUSING) as trace, accelerate(twin, other) as its_trace:
        assert torch.equal(expected, pipe(after=lambda *_: pictures.append(twin(seed=2))))
        assert torch.equal(theirs, twin(seed=2))
    assert trace.kinds == KINDS and its_trace.kinds == "ffcrrcrrcr"
    assert all(torch.equal(theirs, picture) for picture in pictures)
