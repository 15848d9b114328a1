"""The similarity map: what `observe` reports is what plain forward hooks see."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from blockdance import Observation, ReuseConfig, Schedule, SessionError, StepKind, accelerate, observe, record
from tests.tiny import BLOCKS, STEPS, Case, pixart, run_pixart

States = list[list[Tensor]]
"""Per block the outputs of its runs in order, each (rows, tokens, width)."""


def captured(pipe: Any) -> States:
    """Lists that get the output of every block from now on, by plain forward hooks."""
    states: States = [[] for _ in range(BLOCKS)]
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda _, __, output, index=index: states[index].append(output.clone()))
    return states


def model_inputs(pipe: Any) -> list[dict[str, Any]]:
    """A list that gets the keyword arguments of every call of the transformer from now on."""
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    return calls


def unconditional_rows(case: Case, kwargs: dict[str, Any], batch: int) -> Tensor:
    """Which rows of a guided call got the null condition: a mask from the inputs themselves."""
    if case.name == "dit":
        return kwargs["class_labels"] == 1000
    negative = torch.randn(2 * batch, 5, 12, generator=torch.Generator().manual_seed(1))[batch:]
    text = kwargs["encoder_hidden_states"]
    return torch.stack([(row == negative).flatten(1).all(dim=1).any() for row in text])


def direct_cosine(states: States) -> Tensor:
    """(blocks, steps, rows): the mean over tokens of the cosine to the run before, NaN at the first."""
    stacked = torch.stack([torch.stack(block) for block in states])  # (blocks, steps, rows, tokens, width)
    before, now = stacked[:, :-1], stacked[:, 1:]
    cosine = (before * now).sum(-1) / (before.square().sum(-1).sqrt() * now.square().sum(-1).sqrt())
    return after_nothing(cosine.mean(-1))


def direct_change(states: States) -> Tensor:
    """(blocks, steps, rows): the L2 norm of the change over that of the run before, NaN at the first."""
    stacked = torch.stack([torch.stack(block) for block in states])
    before, now = stacked[:, :-1], stacked[:, 1:]
    return after_nothing((now - before).square().sum((-1, -2)).sqrt() / before.square().sum((-1, -2)).sqrt())


def after_nothing(values: Tensor) -> Tensor:
    """(blocks, steps - 1, rows) -> (blocks, steps, rows) with NaN for the first step."""
    return torch.cat([torch.full_like(values[:, :1], torch.nan), values], dim=1)


def assert_same(observation: Observation, branch: str, states: States, rows: Tensor | slice) -> None:
    torch.testing.assert_close(observation.cosine(branch), direct_cosine(states)[:, :, rows], equal_nan=True)
    torch.testing.assert_close(observation.relative_change(branch), direct_change(states)[:, :, rows], equal_nan=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_guided_values_are_those_of_plain_hooks_in_each_branch(case: Case, batch: int) -> None:
    pipe = case.build()
    states, calls = captured(pipe), model_inputs(pipe)
    with observe(pipe) as observation:
        case.run(pipe, batch=batch)
    null = unconditional_rows(case, calls[0], batch)
    assert null.tolist() == [case.name == "pixart"] * batch + [case.name == "dit"] * batch
    assert observation.branches == ["conditional", "unconditional"]
    assert observation.cosine().shape == observation.relative_change().shape == (BLOCKS, STEPS, batch)
    assert observation.num_blocks == BLOCKS and observation.num_steps == STEPS
    assert_same(observation, "conditional", states, ~null)
    assert_same(observation, "unconditional", states, null)
    assert not observation.cosine("conditional").allclose(observation.cosine("unconditional"), equal_nan=True)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_without_guidance_every_row_is_conditional(case: Case, batch: int) -> None:
    pipe = case.build()
    states = captured(pipe)
    with observe(pipe) as observation:
        case.run(pipe, batch=batch, guided=False)
    assert observation.branches == ["conditional"]
    assert observation.cosine().shape == (BLOCKS, STEPS, batch)
    assert_same(observation, "conditional", states, slice(None))


def test_guidance_in_two_calls_is_the_conditional_call_and_then_the_unconditional(case: Case) -> None:
    pipe = case.build()
    states = captured(pipe)
    with observe(pipe) as observation, torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        branches = [case.inputs(), case.inputs()]
        for timestep in pipe.scheduler.timesteps:
            for inputs in branches:
                pipe.transformer(**inputs | {"hidden_states": torch.randn(2, 4, 8, 8)})
            pipe.scheduler.step(torch.zeros(2, 4, 8, 8), timestep, torch.zeros(2, 4, 8, 8))
    assert observation.branches == ["conditional", "unconditional"]
    assert_same(observation, "conditional", [block[0::2] for block in states], slice(None))
    assert_same(observation, "unconditional", [block[1::2] for block in states], slice(None))


def test_the_first_step_and_only_it_has_nothing_to_compare(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as observation:
        case.run(pipe)
    for values in (observation.cosine(), observation.relative_change()):
        assert values.isnan()[:, 0].all()
        assert not values.isnan()[:, 1:].any()


def test_a_run_of_one_step_has_a_map_of_nothing(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as observation:
        case.run(pipe, steps=1, batch=2)
    assert observation.branches == ["conditional", "unconditional"]
    for branch in observation.branches:
        assert observation.cosine(branch).shape == observation.relative_change(branch).shape == (BLOCKS, 1, 2)
        assert observation.cosine(branch).isnan().all() and observation.relative_change(branch).isnan().all()


@pytest.mark.parametrize("outer", ["observe", "accelerate"])
@pytest.mark.parametrize(("text", "cutoff"), [("ffcrrcrffc", 2), ("crcrcrcrcr", 4), ("cfrfffcrrr", 0)])
def test_a_block_skipped_now_or_a_step_ago_has_nothing_to_compare(case: Case, text: str, cutoff: int, outer: str) -> None:
    pipe, schedule = case.build(), Schedule.parse(text, cutoff)
    states = captured(pipe)
    if outer == "observe":
        with observe(pipe) as observation, accelerate(pipe, schedule):
            case.run(pipe)
    else:
        with accelerate(pipe, schedule), observe(pipe) as observation:
            case.run(pipe)
    reuse = [kind is StepKind.REUSE for kind in schedule]
    skipped = torch.tensor([[block <= cutoff and step for step in reuse] for block in range(BLOCKS)])
    missing = skipped.clone()
    missing[:, 0] = True
    missing[:, 1:] |= skipped[:, :-1]
    for branch in observation.branches:
        assert torch.equal(observation.cosine(branch).isnan(), missing[:, :, None])
        assert torch.equal(observation.relative_change(branch).isnan(), missing[:, :, None])
    for block in range(cutoff + 1, BLOCKS):
        rows = slice(1, 2) if case.name == "pixart" else slice(0, 1)
        expected = direct_cosine([states[block]])[:, :, rows]
        torch.testing.assert_close(observation.cosine()[block : block + 1], expected, equal_nan=True)


def test_replayed_steps_have_nothing_to_compare(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    with observe(pipe) as observation, accelerate(pipe, Schedule.parse("ffffccrfff", 2), replay=recording):
        case.run(pipe)
    first_compared = 6
    assert observation.cosine().isnan()[:, :first_compared].all()
    assert not observation.cosine().isnan()[3:, first_compared:].any()


def test_observing_a_recorded_run_sees_the_baseline(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as alone:
        plain = case.run(pipe)
    with record(pipe), observe(pipe) as observation:
        assert torch.equal(plain, case.run(pipe))
    torch.testing.assert_close(observation.cosine(), alone.cosine(), rtol=0, atol=0, equal_nan=True)


def test_a_second_order_scheduler_compares_the_first_evaluations_of_adjacent_steps() -> None:
    pipe = pixart()
    pipe.scheduler = HeunDiscreteScheduler()
    states = captured(pipe)
    with observe(pipe) as observation:
        run_pixart(pipe)
    assert observation.num_steps == STEPS
    assert len(states[0]) == 2 * STEPS - 1
    assert_same(observation, "conditional", [block[::2] for block in states], slice(1, 2))


def test_a_second_run_inside_replaces_the_first(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as alone:
        case.run(pipe, seed=2, steps=6, guided=False)
    with observe(pipe) as observation:
        case.run(pipe, seed=1, batch=2)
        case.run(pipe, seed=2, steps=6, guided=False)
    assert observation.branches == ["conditional"]
    assert observation.num_steps == 6
    torch.testing.assert_close(observation.cosine(), alone.cosine(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(observation.relative_change(), alone.relative_change(), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(SessionError, match="got 'unconditional'"):
        observation.relative_change("unconditional")


def test_a_branch_that_was_not_seen_is_named_with_those_that_were(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as observation:
        case.run(pipe)
    with pytest.raises(SessionError, match=r"branch must be one of \['conditional', 'unconditional'\], got 'middle'"):
        observation.cosine("middle")
    with observe(pipe) as observation:
        case.run(pipe, guided=False)
    with pytest.raises(SessionError, match=r"branch must be one of \['conditional'\], got 'unconditional'"):
        observation.relative_change("unconditional")


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Hide what is alive already from the garbage collector, so that it lists only what the test makes."""
    gc.freeze()
    yield
    gc.unfreeze()


def live_states() -> int:
    """How many new tensors of the shape of a guided hidden state are alive."""
    gc.collect()
    return sum(type(thing) is Tensor and thing.shape == (2, 16, 16) for thing in gc.get_objects())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("steps", [4, 12])
def test_one_step_of_hidden_states_is_held_however_long_the_run(case: Case, steps: int) -> None:
    pipe = case.build()
    held: list[int] = []
    with observe(pipe) as observation, accelerate(pipe, ReuseConfig(1), on_step=lambda *_: held.append(live_states())):
        case.run(pipe, steps=steps)
    assert held == [BLOCKS] * steps
    assert live_states() == 0
    assert observation.num_steps == steps


def test_an_observation_under_gradients_keeps_no_graph(case: Case) -> None:
    pipe = case.build()
    with observe(pipe) as observation:
        pipe.scheduler.set_timesteps(3)
        for timestep in pipe.scheduler.timesteps:
            pipe.transformer(**case.inputs())
            pipe.scheduler.step(torch.zeros(2, 4, 8, 8), timestep, torch.zeros(2, 4, 8, 8))
    assert not observation.cosine().requires_grad
    assert not observation.relative_change().requires_grad
