"""What SD3's pipelines add: skip-layer guidance, ControlNet residuals, and runs from a picture."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from torch import Tensor

from blockdance import ReuseConfig, Schedule, ScheduleError, accelerate
from tests.test_adapters import Loop
from tests.zoo import ZOO, sd3_pipeline

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


def test_each_sample_keeps_its_own_controlnet_residuals(loop: Loop) -> None:
    """Three samples that reuse at different steps, two rows each as in guidance, get what they get alone."""
    schedules = [Schedule.parse(text, DEPTH - 2) for text in ("fcrr", "ffcr", "fcrf")]
    inputs = SD3.inputs(6)
    stream = loop.transformer.pos_embed(inputs[SD3.latent])
    noise = torch.Generator().manual_seed(2)
    added = [torch.randn(stream.shape, generator=noise) for _ in range(DEPTH)]

    def run(plan: Schedule | list[Schedule], rows: list[int]) -> list[Tensor]:
        ours = {name: value[rows] for name, value in inputs.items()}
        outputs = []
        with torch.no_grad(), accelerate(loop, plan):
            loop.scheduler.set_timesteps(4)
            for step, moment in enumerate(loop.scheduler.timesteps):
                now = ours | {SD3.latent: ours[SD3.latent] + step}
                residuals = [(step + 1) * one[rows] for one in added]
                outputs.append(loop.transformer(**now, block_controlnet_hidden_states=residuals).sample)
                loop.scheduler.step(now[SD3.latent], moment, now[SD3.latent])
        return outputs

    together = run(schedules, list(range(6)))
    for sample, schedule in enumerate(schedules):
        rows = [sample, sample + 3]
        for ours, alone in zip(together, run(schedule, rows), strict=True):
            torch.testing.assert_close(ours[rows], alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def img2img() -> StableDiffusion3Img2ImgPipeline:
    pipe = StableDiffusion3Img2ImgPipeline(**sd3_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("strength", "steps"), [(0.35, 4), (0.6, 6), (1.0, 10)])
def test_a_run_from_a_picture_counts_the_steps_that_run(
    img2img: StableDiffusion3Img2ImgPipeline, strength: float, steps: int
) -> None:
    def draw() -> Tensor:
        picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(0)
        output = img2img(
            prompt="a red apple", image=picture, strength=strength, num_inference_steps=10, generator=generator, height=8,
            width=8, output_type="pt",
        )  # fmt: skip
        images: Tensor = output.images
        return images

    moments: list[Tensor] = []
    watch = img2img.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: moments.append(kwargs["timestep"]), with_kwargs=True
    )
    plain = draw()
    watch.remove()
    assert len(moments) == steps  # the plain pipeline's, which rounds up
    with accelerate(img2img, ReuseConfig(1)) as trace:
        assert torch.equal(plain, draw())
    assert trace.kinds == "f" * steps and trace.block_evaluations == DEPTH * steps
    with accelerate(img2img, ReuseConfig(2, 1, 0.0, 1.0)) as trace:
        assert not torch.equal(plain, draw())
    reused = trace.kinds
    assert reused == "cr" * (steps // 2)
    assert trace.block_evaluations == (DEPTH + DEPTH - 2) * (steps // 2)
    with accelerate(img2img, Schedule.parse(reused, 1)) as trace:
        draw()
    assert trace.kinds == reused
    if steps < 10:
        whole, told = Schedule.parse("cr" * 5, 1), f"10 steps, the run has {steps}"
        with pytest.raises(ScheduleError, match=told), accelerate(img2img, whole):
            draw()
