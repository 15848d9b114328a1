"""What SD3's pipelines add to a call of the transformer: skip-layer guidance and ControlNet residuals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from blockdance import Schedule, accelerate
from tests.test_adapters import Loop
from tests.zoo import ZOO

SD3 = next(tiny for tiny in ZOO if tiny.name == "SD3Transformer2DModel")
DEPTH = SD3.num_blocks


@pytest.fixture
def loop() -> Loop:
    return Loop(SD3)


def guided_steps(loop: Loop, schedule: Schedule, **more: Any) -> tuple[list[list[Tensor]], Any]:
    """Each step: one call with both halves of a guided batch, then one of a single row with the `more` arguments."""
    both, one = SD3.inputs(2), SD3.inputs(1)
    outputs = []
    with torch.no_grad(), accelerate(loop, schedule) as trace:
        loop.scheduler.set_timesteps(len(schedule))
        for moment in loop.scheduler.timesteps:
            outputs.append([loop.transformer(**both).sample, loop.transformer(**one, **more).sample])
            loop.scheduler.step(both[SD3.latent], moment, both[SD3.latent])
    return outputs, trace


@pytest.mark.parametrize("skipped", range(DEPTH))
@pytest.mark.parametrize("cutoff", range(DEPTH - 1))
def test_skip_layer_guidance_at_half_batch_stays_exact(loop: Loop, cutoff: int, skipped: int) -> None:
    (full, aside), (full_again, aside_again) = guided_steps(loop, Schedule.parse("cr", cutoff), skip_layers=[skipped])[0]
    assert (len(full), len(aside)) == (2, 1)
    assert torch.equal(full, full_again) and torch.equal(aside, aside_again)
    with torch.no_grad():
        assert torch.equal(aside, loop.transformer(**SD3.inputs(1), skip_layers=[skipped]).sample)


def test_skipped_layers_are_not_counted_as_run(loop: Loop) -> None:
    trace = guided_steps(loop, Schedule.parse("fcr", 1), skip_layers=[DEPTH - 1])[1]
    assert [step.blocks_total for step in trace.steps] == [2 * DEPTH - 1] * 3
    assert [step.blocks_evaluated for step in trace.steps] == [2 * DEPTH - 1] * 2 + [2 * (DEPTH - 2) - 1]


def test_a_call_that_leaves_the_cutoff_block_out_runs_all_others(loop: Loop) -> None:
    trace = guided_steps(loop, Schedule.parse("cr", 1), skip_layers=[1])[1]
    assert trace.steps[1].blocks_evaluated == (DEPTH - 2) + (DEPTH - 1)


def residuals(loop: Loop, scale: float) -> list[Tensor]:
    """What a ControlNet adds after each block."""
    stream = loop.transformer.pos_embed(SD3.inputs(1)[SD3.latent])
    return [scale * (block + 1) * torch.ones_like(stream) for block in range(DEPTH)]


@pytest.mark.parametrize("cutoff", range(DEPTH - 1))
def test_controlnet_residuals_after_the_cutoff_are_the_current_ones(loop: Loop, cutoff: int) -> None:
    inputs, outputs = SD3.inputs(1), []
    strengths = [0.1, 0.1, 0.2]
    with torch.no_grad(), accelerate(loop, Schedule.parse("crr", cutoff)):
        loop.scheduler.set_timesteps(3)
        for moment, strength in zip(loop.scheduler.timesteps, strengths, strict=True):
            call = loop.transformer(**inputs, block_controlnet_hidden_states=residuals(loop, strength))
            outputs.append(call.sample)
            loop.scheduler.step(inputs[SD3.latent], moment, inputs[SD3.latent])
    cached, same, stronger = outputs
    assert torch.equal(cached, same)
    assert not torch.equal(same, stronger)
