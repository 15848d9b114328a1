"""The video model in the box, and the recipe that made it: it begins as the picture model, frame by frame."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from assets.recipe.data import Pack
from assets.recipe.inflate import inflated
from assets.recipe.learner import Learner, run
from assets.recipe.model import build_text_encoder, build_tokenizer, build_transformer
from assets.recipe.video import new_pipeline, video_loss
from assets.recipe.video_data import FRAMES, LEAST_MOTION, clip, motion
from blockdance import ReuseConfig, accelerate, load_demo_video_pipeline
from blockdance.demo import VIDEO_FOLDER
from blockdance.models.stdit import STDiT

WIDTH, WORDS, CAPTIONS = 32, 4, [["red apple"], ["blue boat"]]


def picture_transformer() -> Any:
    torch.manual_seed(0)
    model = build_transformer(2, WIDTH)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def test_before_training_every_frame_is_what_the_picture_model_predicts() -> None:
    picture, text = picture_transformer(), torch.randn(1, WORDS, WIDTH)
    video = inflated(picture, text[0, 0], 3, WORDS).eval()
    latent, timestep, mask = torch.randn(1, 16, 3, 8, 8), torch.tensor([700]), torch.tensor([[1, 1, 0, 0]])
    ours = video(latent, timestep, text[:, None], mask)
    assert not ours[:, 16:].any(), "the variance that nothing trains stays zero"
    for frame in range(3):
        theirs = picture(latent[:, :, frame], text, timestep, encoder_attention_mask=mask, return_dict=False)[0]
        assert torch.allclose(ours[:, :16, frame], theirs, atol=1e-5)


def test_a_new_video_model_takes_no_prompt_for_what_the_picture_model_takes_for_it() -> None:
    pipe = new_pipeline(2)
    kept = pipe.transformer.y_embedder.y_embedding
    assert torch.equal(kept, kept[:1].expand_as(kept)) and kept.any()
    assert pipe.transformer.config.input_size == (2, 8, 8) and len(pipe.transformer.blocks) >= 12


class Tiny:
    """What `video_loss` needs of a pipeline."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tokenizer = build_tokenizer(CAPTIONS)
        self.text_encoder = build_text_encoder(len(self.tokenizer), WIDTH)
        self.transformer = inflated(picture_transformer(), torch.zeros(WIDTH), 2, WORDS)
        self.scheduler = load_demo_video_pipeline().scheduler


def training(folder: Path, updates: int) -> Learner:
    """Train a tiny video model to so many updates."""
    args = argparse.Namespace(
        updates=updates,
        minutes=None,
        checkpoint_minutes=10,
        batch=2,
        ema=0.9,
        muon_rate=0.01,
        adamw_rate=1e-3,
        out=folder,
        no_compile=True,
    )
    pipe: Any = Tiny()
    learner = Learner(pipe.tokenizer, pipe.text_encoder, pipe.transformer, pipe.transformer.blocks, args)
    learner.resume(folder)
    ids, latents = (
        pipe.tokenizer("red apple", padding="max_length", max_length=WORDS, return_tensors="pt"),
        torch.ones(1, 16, 2, 8, 8),
    )

    def loss() -> torch.Tensor:
        torch.manual_seed(learner.updates)
        return video_loss(learner, pipe, latents, ids.input_ids, ids.attention_mask)

    run(learner, args, loss, lambda: None)
    return learner


def test_a_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = training(tmp_path, 2)
    kept = [weight.clone() for weight in first.nets.parameters()]
    again = training(tmp_path, 2)
    assert again.updates == 2 and all(map(torch.equal, kept, again.nets.parameters()))
    more = training(tmp_path, 4)
    assert more.updates == 4 and more.ema.optimization_step == 4
    assert not all(map(torch.equal, kept, more.nets.parameters()))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [4, 8] and lines[-1]["hardware"]


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    for updates in (1, 40):
        training(tmp_path, updates)
    first, last = (json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert last < 0.8 * first


def animation(file: Path, shifts: list[int]) -> Path:
    """A square that moves by so many pixels from frame to frame."""
    frames = []
    for shift in np.cumsum(shifts):
        pixels = np.full((256, 256, 4), 255, np.uint8)
        pixels[80:160, 20 + shift : 100 + shift, :3] = 0
        frames.append(Image.fromarray(pixels))
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=40, loop=0)
    return file


def test_a_clip_is_so_many_frames_of_an_animation_and_a_still_is_none(tmp_path: Path) -> None:
    moving = clip(animation(tmp_path / "a.webp", [4] * 24), FRAMES)
    assert moving is not None and moving.shape == (FRAMES, 64, 64, 3) and motion(moving) > LEAST_MOTION
    assert clip(animation(tmp_path / "b.webp", [0]), FRAMES) is None


def test_a_pack_of_clips_comes_back_as_it_was(tmp_path: Path) -> None:
    pack = Pack(np.arange(2 * 2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 4, 3), CAPTIONS)
    pack.save(tmp_path / "clips.npz")
    back = Pack.load(tmp_path / "clips.npz")
    assert np.array_equal(back.pictures, pack.pictures) and back.captions == CAPTIONS


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_demo_video_pipeline()


def test_the_video_model_is_an_stdit_of_open_sora_and_small(pipe: Any) -> None:
    assert type(pipe.transformer) is STDiT and type(pipe.vae) is AutoencoderKL and len(pipe.transformer.blocks) >= 12
    files = [file for file in VIDEO_FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 40e6


def test_its_clips_move_and_follow_the_prompt(pipe: Any) -> None:
    def drawn(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=8, generator=generator, output_type="np").frames[0]

    face, turtle = drawn("grinning face"), drawn("turtle")
    assert face.shape == (FRAMES, 64, 64, 3)
    assert motion(255 * face) > LEAST_MOTION
    between = np.abs(255 * (face - turtle)).mean()
    assert between > 2 * motion(255 * face), "frames of a clip are more alike than clips of two prompts"


def test_its_blocks_are_reused_as_those_of_a_picture_model(pipe: Any) -> None:
    with accelerate(pipe, ReuseConfig(2, window_start=0.25)) as trace:
        pipe("turtle", num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert trace.kinds == "ffcrcrcr" and trace.speedup_ideal > 1.3


def test_it_names_words_it_does_not_know_and_those_near_them(pipe: Any) -> None:
    assert pipe.unknown_words("grinning girafe") == ["girafe"]
    assert pipe.nearest_words("girafe")[0] == "giraffe"
    assert pipe.nearest_words("zyxgrblt") == []
