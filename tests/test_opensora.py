"""Open-Sora 1.0's pipeline, tiny and random, by itself and inside the library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from blockdance import ConfigError, ReuseConfig, Schedule, accelerate, observe
from blockdance.models.opensora import OpenSoraPipeline
from tests.tiny_video import opensora

STEPS = 5


@pytest.fixture(scope="module")
def pipe() -> OpenSoraPipeline:
    return opensora()


def draw(pipe: OpenSoraPipeline, prompt: Any = "a red apple", seed: int = 0, **more: Any) -> Any:
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"} | more
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), return_dict=False, **arguments)[0]


def test_a_video_has_the_frames_and_the_size_asked_for(pipe: OpenSoraPipeline) -> None:
    assert draw(pipe).shape == (1, 2, 16, 16, 3)
    assert draw(pipe, num_frames=3, height=8, width=12).shape == (1, 3, 8, 12, 3)
    assert draw(pipe, output_type="latent").shape == (1, 4, 2, 8, 8)
    videos = draw(pipe, ["a red apple", "blue apple turns"], output_type="pil")
    assert [len(video) for video in videos] == [2, 2]
    assert videos[0][0].size == (16, 16)


def test_a_seed_decides_and_so_do_prompt_and_guidance(pipe: OpenSoraPipeline) -> None:
    once = draw(pipe)
    assert np.array_equal(once, draw(pipe))
    assert 0 <= once.min() < once.max() <= 1
    for other in (draw(pipe, seed=1), draw(pipe, "blue apple turns"), draw(pipe, guidance_scale=1.0)):
        assert not np.allclose(once, other)


def test_a_batch_draws_what_its_prompts_draw_alone(pipe: OpenSoraPipeline) -> None:
    prompts, noise = ["a red apple", "blue apple turns a red"], torch.randn(2, 4, 2, 8, 8)
    together = draw(pipe, prompts, latents=noise)
    alone = [draw(pipe, prompt, latents=noise[k : k + 1])[0] for k, prompt in enumerate(prompts)]
    assert np.allclose(together, np.stack(alone), atol=1e-4)


def test_frames_are_decoded_each_by_itself(pipe: OpenSoraPipeline) -> None:
    latent = draw(pipe, output_type="latent")
    with torch.no_grad():
        straight, turned = pipe.draw(latent, "np"), pipe.draw(latent.flip(2), "np")
    assert np.allclose(straight, turned[:, ::-1], atol=1e-5)


def test_a_scheduler_that_takes_the_variance_gets_it() -> None:
    pipe = opensora()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    assert np.isfinite(draw(pipe)).all()


def test_reuse_runs_the_tail_and_no_reuse_changes_no_bit(pipe: OpenSoraPipeline) -> None:
    plain = draw(pipe)
    with accelerate(pipe, ReuseConfig(1)):
        assert np.array_equal(plain, draw(pipe))
    with accelerate(pipe, Schedule.parse("fcrcr", 2)) as trace:
        assert not np.array_equal(plain, draw(pipe))
    assert trace.block_evaluations == 3 * 4 + 2 * 1
    assert np.array_equal(plain, draw(pipe))


def test_the_conditional_half_of_the_batch_is_the_first(pipe: OpenSoraPipeline) -> None:
    """With next to no guidance the latents are those of a run without, so the conditional half is that run."""
    with observe(pipe) as guided:
        draw(pipe, guidance_scale=1.0 + 1e-9)
    with observe(pipe) as plain:
        draw(pipe, guidance_scale=1.0)
    assert guided.branches == ["conditional", "unconditional"] and plain.branches == ["conditional"]
    ours, theirs = guided.cosine()[:, 1:], plain.cosine()[:, 1:]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(guided.cosine("unconditional")[:, 1:], theirs, atol=1e-4)


def test_a_saved_pipeline_is_the_same(pipe: OpenSoraPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = OpenSoraPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe), draw(loaded))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": " "}, "prompt must be one or more texts that are not empty"),
        ({"prompt": []}, "prompt must be one or more texts"),
        ({"num_frames": -1}, "num_frames must be a multiple of 1, got -1"),
        ({"height": 14}, "height must be a multiple of 4, got 14"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, got 0.5"),
        ({"output_type": "gif"}, "output_type must be one of pil, np, latent, got 'gif'"),
        ({"latents": torch.zeros(1, 4, 1, 8, 8)}, r"latents must have the shape \(1, 4, 2, 8, 8\), got \(1, 4, 1, 8, 8\)"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(pipe: OpenSoraPipeline, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(pipe, **wrong)
