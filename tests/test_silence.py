"""Whenever something was planned and nothing was reused, the trace says why, and a warning is given once."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from blockdance import BlockDanceConfig, BlockDanceWarning, ReuseConfig, Schedule, accelerate, apply_block_dance
from blockdance.storage import Latest
from tests.guided import TWO, Guided
from tests.test_ada import Given

REUSING = ReuseConfig(2, 1, 0.3, 1.0)


@pytest.fixture(params=TWO, ids=lambda tiny: tiny.name)
def pipe(request: pytest.FixtureRequest) -> Guided:
    return Guided(request.param)


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if issubclass(one.category, BlockDanceWarning)]


def test_what_reuses_says_nothing(pipe: Guided) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlockDanceWarning)
        with accelerate(pipe, REUSING) as trace:
            pipe()
    assert trace.note is None


def test_what_was_never_to_reuse_says_why_and_does_not_warn(pipe: Guided) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlockDanceWarning)
        with accelerate(pipe, ReuseConfig(1)) as trace:
            pipe()
        with accelerate(pipe, Schedule.dense(10)):
            pipe()
    assert trace.note is not None


def with_gradients(pipe: Guided) -> None:
    pipe.scheduler.set_timesteps(10)
    for timestep in pipe.scheduler.timesteps:
        for condition in pipe.conditions:
            with torch.enable_grad():
                output = pipe.predict(pipe.latent(), timestep, condition)
        pipe.scheduler.step(output.detach(), timestep, pipe.latent())


def with_a_text_of_its_own_on_every_step(pipe: Guided) -> None:
    def another(pipe: Guided, step: int, latent: Tensor) -> None:
        pipe.conditions = [pipe.condition(2 * step + 7), pipe.condition(2 * step + 8)]

    pipe(after=another)


def stopped_early(pipe: Guided) -> None:
    class Stop(Exception):
        pass

    def stop(pipe: Guided, step: int, latent: Tensor) -> None:
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        pipe(after=stop)


CASES: dict[str, tuple[Any, str]] = {
    "gradients": (with_gradients, "Gradients are on"),
    "texts": (with_a_text_of_its_own_on_every_step, "No call found what the last cache step had stored"),
    "stopped": (stopped_early, "The run ended after 2 of 10 steps"),
    "few steps": (lambda pipe: pipe(steps=3), "3 steps are too few to reuse"),
    "nothing ran": (lambda pipe: None, "No run was begun inside"),
}


@pytest.mark.parametrize(("run", "words"), CASES.values(), ids=CASES)
def test_a_plan_that_came_to_nothing_is_told_once(pipe: Guided, run: Any, words: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with accelerate(pipe, REUSING) as trace:
            run(pipe)
            run(pipe)
    assert trace.note is not None and trace.note.startswith(words) and trace.note.endswith(".")
    assert len(messages(caught)) == 1 and messages(caught)[0].startswith(words)


def test_a_policy_that_decides_for_no_reuse_says_so(pipe: Guided) -> None:
    policy = Given(Latest(), [Schedule.parse("fffccccccc", 1)])
    words = "The policy decided that every step runs all blocks"
    with pytest.warns(BlockDanceWarning, match=words), accelerate(pipe, policy) as trace:
        pipe()
    assert trace.kinds == "fffccccccc"


def test_an_exception_is_not_talked_over(pipe: Guided) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlockDanceWarning)
        with pytest.raises(KeyError), accelerate(pipe, REUSING):
            raise KeyError


def test_a_loop_whose_calls_come_from_elsewhere_is_told(pipe: Guided) -> None:
    """The transformer is called before the loop; the loop itself only steps."""
    with pytest.warns(BlockDanceWarning, match="not called by the loop"), accelerate(pipe, REUSING) as trace:
        pipe.scheduler.set_timesteps(10)
        for timestep in pipe.scheduler.timesteps:
            pipe.scheduler.step(pipe.latent(1), timestep, pipe.latent())
    assert trace.kinds == "f" * 10 and trace.block_evaluations == 0 and trace.speedup_ideal == 1.0


def test_applied_to_a_transformer_it_is_told_when_it_is_taken_off(pipe: Guided) -> None:
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0, 1))
    with_a_text_of_its_own_on_every_step(pipe)
    with pytest.warns(BlockDanceWarning, match="Nothing was reused in 20 calls"):
        applied.remove()
    applied = apply_block_dance(pipe.transformer, BlockDanceConfig(2, 1, 0, 1))
    pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlockDanceWarning)
        applied.remove()
