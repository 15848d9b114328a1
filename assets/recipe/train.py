"""Train the transformer and its text encoder on the latents of the packed pictures; stop and start at any time.

    python -m assets.recipe.train --updates 8000 --out build/velocity
    python -m assets.recipe.train --updates 1000 --prediction epsilon --out build/noise
    python -m assets.recipe.train --updates 60000 --data build/all.npz --vae build/vae-all --blocks 26 --width 160 \\
        --batch 256 --ema 0.9999 --reorder 0.1 --painted 0.3 --out build/all    # on a GPU

Muon for the blocks' matrices, AdamW for the rest, EMA, bf16 autocast, `torch.compile`. The rate is constant for half
of the updates and then falls linearly to zero. A second call with the same `--out` continues where the first stopped;
`--start FOLDER` begins from the weights of a pipeline as deep and wide. Runs on a GPU when there is one.
"""

import argparse
import copy
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from assets.recipe.autoencoder import latents_of, to_tensor
from assets.recipe.colours import PAINTS
from assets.recipe.data import Pack, painted_pack
from assets.recipe.learner import Learner, add_arguments, prepared, run
from assets.recipe.model import MAX_WORDS, build_scheduler, build_text_encoder, build_tokenizer, build_transformer
from assets.recipe.sheet import contact_sheet
from blockdance.demo import DemoPipeline, load_demo_pipeline

SHEET_PROMPTS = ("red apple", "octopus", "grinning face", "house with garden", "pizza", "cat face", "rocket", "tulip")


def pick_caption(group: list[str], generator: random.Random, style: str = "", reorder: float = 0.0) -> str:
    """Mostly the full name, sometimes a short name or one word (no colour) fewer, one time in ten nothing (for guidance).

    Args:
        group: the captions of a picture.
        generator: of the chance.
        style: a word before the caption, or one time in four after it; one time in ten left out.
        reorder: how often words change places.
    """
    if generator.random() < 0.1:
        return ""
    caption = group[0] if generator.random() < 0.7 else generator.choice(group)
    parts = caption.split()
    dropped = [place for place, part in enumerate(parts) if part not in PAINTS]
    if len(parts) > 2 and dropped and generator.random() < 0.15:
        parts.pop(generator.choice(dropped))
    if generator.random() < reorder:
        generator.shuffle(parts)
    if style and generator.random() < 0.9:
        parts.insert(0 if generator.random() < 0.75 else len(parts), style)
    return " ".join(parts)


def with_painted(pack: Pack, share: float) -> tuple[Pack, torch.Tensor]:
    """The pictures, painted ones after them if they are to be a share of those seen, and the chance of each to be drawn."""
    chances = torch.full((len(pack),), 1 / len(pack))
    if share == 0:
        return pack, chances
    further = painted_pack(pack)
    return pack + further, torch.cat([(1 - share) * chances, torch.full((len(further),), share / len(further))])


@torch.no_grad()
def begin_from(
    start: DemoPipeline, tokenizer: PreTrainedTokenizerFast, text_encoder: T5EncoderModel, transformer: PixArtTransformer2DModel
) -> None:
    """Take over the weights of a pipeline of the same depth and width, and those of every word that both know."""
    transformer.load_state_dict(start.transformer.state_dict())
    ours, theirs = (encoder.get_input_embeddings().weight for encoder in (text_encoder, start.text_encoder))
    inner = {name: weight for name, weight in start.text_encoder.state_dict().items() if weight.shape != theirs.shape}
    text_encoder.load_state_dict(inner, strict=False)
    known = start.tokenizer.get_vocab()
    for word, row in tokenizer.get_vocab().items():
        if word in known:
            ours[row] = theirs[known[word]]


def tokens_of(learner: Learner, captions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    batch = learner.tokenizer(captions, padding="max_length", max_length=MAX_WORDS, truncation=True, return_tensors="pt")
    ids = batch.input_ids
    unknown = (torch.rand(ids.shape) < 0.02) & (ids > 2)
    ids = ids.masked_fill(unknown, learner.tokenizer.unk_token_id)
    return ids.to(device), batch.attention_mask.to(device)


def timesteps(count: int) -> torch.Tensor:
    """More of the noisy ones, on which the words decide what is drawn: two thirds of them above 500."""
    return (1000 * torch.rand(count) ** 0.6).long()


def diffusion_loss(
    learner: Learner, scheduler: DDIMScheduler, latents: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the predicted noise or velocity at drawn timesteps."""
    noise = torch.randn_like(latents)
    timestep = timesteps(len(latents)).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timestep)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timestep) if velocity else noise
    with torch.autocast(latents.device.type, torch.bfloat16):
        text = learner.text_encoder(ids, attention_mask=mask)[0]
        predicted = learner.transformer(
            noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timestep, return_dict=False
        )[0]
    return F.mse_loss(predicted.float(), target)


def averaged_pipeline(learner: Learner, scheduler: DDIMScheduler, vae: AutoencoderKL) -> DemoPipeline:
    """A pipeline with the averaged weights, on the CPU; the learner is left as it is."""
    learner.ema.store(learner.nets.parameters())
    learner.ema.copy_to(learner.nets.parameters())
    text_encoder = copy.deepcopy(learner.text_encoder).cpu().eval()
    transformer = build_transformer(learner.transformer.config.num_layers, learner.text_encoder.config.d_model)
    transformer.load_state_dict(learner.transformer.state_dict())
    learner.ema.restore(learner.nets.parameters())
    parts = {"transformer": transformer.eval(), "text_encoder": text_encoder, "vae": copy.deepcopy(vae).cpu()}
    return DemoPipeline(**parts, tokenizer=learner.tokenizer, scheduler=copy.deepcopy(scheduler))


def checkpoint(learner: Learner, scheduler: DDIMScheduler, vae: AutoencoderKL, folder: Path) -> None:
    """Write the pipeline with averaged weights, and a small sample sheet."""
    pipe = averaged_pipeline(learner, scheduler, vae)
    pipe.save_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(list(SHEET_PROMPTS), num_inference_steps=30, generator=torch.Generator().manual_seed(0)).images
    contact_sheet(pictures, columns=4).save(folder / f"sheet-{learner.updates:06d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/pictures.npz"))
    parser.add_argument("--vae", type=Path, default=Path("build/vae"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--reorder", type=float, default=0.0, help="how often a caption's words change places (default: never)")
    parser.add_argument("--painted", type=float, default=0.0, help="share of pictures in another colour (default: none)")
    parser.add_argument("--start", type=Path, help="folder of a pipeline to begin from")
    add_arguments(parser)
    args = parser.parse_args()
    device = prepared(args.out)

    pack, shares = with_painted(Pack.load(args.data), args.painted)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    latents = latents_of(vae.to(device), to_tensor(pack.pictures).to(device))
    tokenizer = build_tokenizer(pack.captions, pack.styles)
    transformer = build_transformer(args.blocks, args.width).to(device)
    text_encoder = build_text_encoder(len(tokenizer), args.width).to(device)
    if args.start is not None:
        begin_from(load_demo_pipeline(args.start), tokenizer, text_encoder, transformer)
    learner = Learner(tokenizer, text_encoder, transformer, transformer.transformer_blocks, args)
    learner.resume(args.out)
    scheduler = build_scheduler(args.prediction)

    generator = random.Random(learner.updates)

    def loss_of_batch() -> torch.Tensor:
        chosen = torch.multinomial(shares, args.batch, replacement=True)
        styles = pack.styles or [""] * len(pack.captions)
        captions = [pick_caption(pack.captions[i], generator, styles[i], args.reorder) for i in chosen.tolist()]
        ids, mask = tokens_of(learner, captions, device)
        return diffusion_loss(learner, scheduler, latents[chosen.to(device)], ids, mask)

    run(learner, args, loss_of_batch, lambda: checkpoint(learner, scheduler, vae, args.out))


if __name__ == "__main__":
    main()
