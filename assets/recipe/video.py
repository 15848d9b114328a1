"""Train the video model on the latents of the packed clips, from the picture model in the box; stop and start at any time.

    python -m assets.recipe.video --updates 2000 --batch 8 --muon-rate 0.01 --adamw-rate 5e-4 --out build/video

The picture model's text encoder, autoencoder and blocks are the start (see `inflate`); a second call with the same `--out`
continues where the first stopped, and with `--start assets/video` a training begins from the video model in the box.
"""

import argparse
import copy
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from assets.recipe.autoencoder import latents_of, to_tensor
from assets.recipe.data import Pack
from assets.recipe.inflate import inflated
from assets.recipe.learner import Learner, add_arguments, prepared, run
from assets.recipe.model import MAX_WORDS
from assets.recipe.sheet import CLIPS, contact_sheet
from assets.recipe.train import tokens_of
from blockdance.demo import DemoVideoPipeline, load_demo_pipeline, load_demo_video_pipeline

DROPPED = 0.1
"""Share of clips that are shown without their caption, for guidance."""


def new_pipeline(frames: int) -> DemoVideoPipeline:
    """The video model before training: every frame is the picture model's."""
    picture = load_demo_pipeline()
    picture.tokenizer.model_max_length = MAX_WORDS
    tokens = picture.tokenizer("", return_tensors="pt")
    null_text = picture.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0, 0].detach()
    transformer = inflated(picture.transformer, null_text, frames, MAX_WORDS)
    return DemoVideoPipeline(picture.tokenizer, picture.text_encoder, picture.vae, transformer, picture.scheduler)


def clip_latents(vae: AutoencoderKL, clips: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (n, frames, 64, 64, 3) -> (n, c, frames, 8, 8)."""
    flat = torch.cat([latents_of(vae, to_tensor(clip).to(device)) for clip in clips])
    return flat.unflatten(0, clips.shape[:2]).transpose(1, 2)


def video_loss(learner: Learner, pipe: DemoVideoPipeline, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity at uniformly drawn timesteps, one for all frames of a clip."""
    noise = torch.randn_like(latents)
    timestep = torch.randint(1000, (len(latents),), device=latents.device)
    noisy = pipe.scheduler.add_noise(latents, noise, timestep)
    target = pipe.scheduler.get_velocity(latents, noise, timestep)
    dropped = (torch.rand(len(latents)) < DROPPED).to(latents.device)[:, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        text = learner.text_encoder(ids, attention_mask=mask)[0]  # (b, words, channels)
        text = torch.where(dropped, pipe.transformer.y_embedder.y_embedding, text)
        predicted = learner.transformer(noisy, timestep, text[:, None], mask)
    return F.mse_loss(predicted[:, : latents.shape[1]].float(), target)


def averaged(learner: Learner, pipe: DemoVideoPipeline) -> DemoVideoPipeline:
    """A pipeline with the averaged weights, on the CPU; the learner is left as it is."""
    learner.ema.store(learner.nets.parameters())
    learner.ema.copy_to(learner.nets.parameters())
    encoder, vae = (copy.deepcopy(part).cpu().eval() for part in (pipe.text_encoder, pipe.vae))
    transformer = type(pipe.transformer).from_config(pipe.transformer.config)  # a copy of the compiled one would be compiled
    transformer.load_state_dict(pipe.transformer.state_dict())
    learner.ema.restore(learner.nets.parameters())
    made = DemoVideoPipeline(pipe.tokenizer, encoder, vae, transformer.eval(), copy.deepcopy(pipe.scheduler))
    made.set_progress_bar_config(disable=True)
    return made


def checkpoint(learner: Learner, pipe: DemoVideoPipeline, folder: Path) -> None:
    """Write the pipeline with averaged weights, and a sheet with a clip in every row."""
    made = averaged(learner, pipe)
    made.save_pretrained(folder / "pipeline")
    clips = made(list(CLIPS), generator=torch.Generator().manual_seed(0)).frames
    frames: list[Image.Image] = [frame for clip in clips for frame in clip]
    contact_sheet(frames, columns=len(clips[0])).save(folder / f"sheet-{learner.updates:06d}.png")


def pick_caption(group: list[str], generator: random.Random) -> str:
    """Mostly the full name, sometimes a short name."""
    return group[0] if generator.random() < 0.6 else generator.choice(group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/clips.npz"))
    parser.add_argument("--start", type=Path, help="folder of a video pipeline to begin from (default: the picture model)")
    parser.add_argument("--out", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    device = prepared(args.out)
    pack = Pack.load(args.data)
    pipe = new_pipeline(pack.pictures.shape[1]) if args.start is None else load_demo_video_pipeline(args.start)
    pipe.to(device)
    latents = clip_latents(pipe.vae, pack.pictures, device)
    for net in (pipe.transformer, pipe.text_encoder):
        net.train()
    learner = Learner(pipe.tokenizer, pipe.text_encoder, pipe.transformer, pipe.transformer.blocks, args)
    learner.resume(args.out)
    generator = random.Random(learner.updates)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(latents), (args.batch,))
        ids, mask = tokens_of(learner, [pick_caption(pack.captions[i], generator) for i in chosen.tolist()], device)
        return video_loss(learner, pipe, latents[chosen.to(device)], ids, mask)

    run(learner, args, loss_of_batch, lambda: checkpoint(learner, pipe, args.out))


if __name__ == "__main__":
    main()
