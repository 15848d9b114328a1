"""The model in the box: it loads from disk alone, draws, and knows which words it does not know."""

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel

from blockdance import ConfigError, UnsupportedModelError, load_demo_pipeline, load_demo_styles_pipeline
from blockdance.demo import MODEL_FOLDER, STYLES, STYLES_FOLDER, DemoPipeline
from tests.tiny import quiet


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_demo_pipeline()


def draw(pipe: Any, prompt: str = "red apple", seed: int = 0, **arguments: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=6, generator=generator, output_type="np", **arguments).images[0]


def with_scheduler(pipe: Any, scheduler: Any) -> Any:
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    return quiet(DemoPipeline(**parts, scheduler=scheduler.from_config(pipe.scheduler.config)))


def test_the_model_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*place: Any, **_: Any) -> Any:
        asked.append(place)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert isinstance(load_demo_pipeline(), DemoPipeline)
    assert asked == []


def test_the_model_is_a_pixart_deep_enough_to_show_reuse(pipe: Any) -> None:
    assert type(pipe.transformer) is PixArtTransformer2DModel
    assert len(pipe.transformer.transformer_blocks) >= 14
    shapes: list[torch.Size] = []
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    draw(pipe)
    hook.remove()
    assert {(rows, tokens) for rows, tokens, _ in shapes} == {(2, 64)}


def test_every_part_of_the_model_is_float32_on_the_cpu(pipe: Any) -> None:
    parameters = [weight for part in (pipe.transformer, pipe.vae, pipe.text_encoder) for weight in part.parameters()]
    assert {(weight.dtype, weight.device.type) for weight in parameters} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("folder", [MODEL_FOLDER, STYLES_FOLDER], ids=lambda folder: folder.name)
def test_the_weights_are_safetensors_and_small(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 40e6 and max(file.stat().st_size for file in files) < 16 * 2**20


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_stock_schedulers_drive_the_model(pipe: Any, scheduler: Any) -> None:
    view = with_scheduler(pipe, scheduler)
    picture = draw(view)
    assert type(view.scheduler) is scheduler
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all() and picture.std() > 0.05


def test_two_schedulers_draw_more_alike_than_two_seeds(pipe: Any) -> None:
    ddim, solver = with_scheduler(pipe, DDIMScheduler), with_scheduler(pipe, DPMSolverMultistepScheduler)
    ours, theirs, other = draw(ddim, seed=0), draw(solver, seed=0), draw(ddim, seed=1)
    assert np.abs(ours - theirs).mean() < np.abs(ours - other).mean()


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_picture(pipe: Any) -> None:
    assert np.array_equal(draw(pipe, seed=3), draw(pipe, seed=3))
    assert not np.array_equal(draw(pipe, seed=3), draw(pipe, seed=4))


def test_different_prompts_give_different_pictures(pipe: Any) -> None:
    apple, boat = draw(pipe, "red apple"), draw(pipe, "blue boat")
    assert not pipe.unknown_words("red apple blue boat")
    assert np.abs(apple - boat).mean() > 0.02


def test_a_call_may_set_what_the_defaults_set(pipe: Any) -> None:
    assert not np.array_equal(draw(pipe), draw(pipe, guidance_scale=2.0))
    assert np.array_equal(draw(pipe), draw(pipe, guidance_scale=4.0))
    pipe("red apple", num_inference_steps=2, output_type="latent")
    assert pipe.scheduler.num_inference_steps == 2


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("red apple", []),
        ("red zyxgrblt apple", ["zyxgrblt"]),
        ("qqfoo red wwbar apple qqfoo", ["qqfoo", "wwbar", "qqfoo"]),
        ("RED, Apple!", []),
        ("Red ZYXgrblt-apple", ["zyxgrblt"]),
        ("", []),
        ("zyxgrblt " * 20, ["zyxgrblt"] * 20),
    ],
)
def test_the_words_the_model_does_not_know_are_named_in_order(pipe: Any, prompt: str, unknown: list[str]) -> None:
    assert pipe.unknown_words(prompt) == unknown


@pytest.mark.parametrize("kind", [Path, str])
def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path, kind: type) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no pipeline in {tmp_path}: model_index.json is missing"):
        load_demo_pipeline(kind(tmp_path))


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no pipeline in .*nowhere"):
        load_demo_pipeline(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def styled() -> DemoPipeline:
    return load_demo_styles_pipeline()


def test_a_style_is_a_word_of_the_prompt(styled: DemoPipeline) -> None:
    assert styled.styles == STYLES and not styled.unknown_words("noto red apple")
    assert styled.in_style("red apple", "noto") == "noto red apple"
    assert styled.in_style("Twemoji red apple", "noto") == styled.in_style("red apple noto", "noto") == "noto red apple"
    assert np.array_equal(draw(styled, style="noto"), draw(styled, "noto red apple"))
    two = styled(["red apple", "octopus"], style="noto", num_inference_steps=2, output_type="np").images
    assert two.shape == (2, 64, 64, 3)


def test_each_style_draws_another_picture_of_the_same_noise(styled: DemoPipeline) -> None:
    drawn = [draw(styled, style=style) for style in STYLES]
    assert all(np.abs(one - other).mean() > 0.01 for one, other in ((drawn[0], drawn[1]), (drawn[1], drawn[2])))


def test_a_style_that_is_not_there_is_refused(pipe: Any, styled: DemoPipeline) -> None:
    with pytest.raises(ConfigError, match="one of fluent, noto, twemoji, got 'oil'"):
        draw(styled, style="oil")
    with pytest.raises(ConfigError, match="left out with a model of one style, got 'noto'"):
        draw(pipe, style="noto")
    with pytest.raises(ConfigError, match="'noto' and no prompt"):
        styled(style="noto", prompt_embeds=torch.zeros(1, 16, 128))
