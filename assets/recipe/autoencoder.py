"""Train the small autoencoder in whose latents the transformer works.

    python -m assets.recipe.autoencoder --minutes 15
    python -m assets.recipe.autoencoder --minutes 15 --decoder-only   # later: sharpen, latents unchanged

An `AutoencoderKL` of about a million parameters takes a 64x64 picture to 8x8 latents of 16 channels. After training,
the latents are standardised per channel, folded into the two 1x1 convolutions, so `scaling_factor` stays 1.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from assets.recipe.data import Pack

LATENT_CHANNELS = 16


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (n, 64, 64, 3) -> float (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def jitter(batch: torch.Tensor) -> torch.Tensor:
    """Shift every picture by up to 4 px on its white ground: the autoencoder must not learn places by heart."""
    padded = F.pad(batch, (4, 4, 4, 4), value=1.0)
    rows, columns = torch.randint(0, 9, (2, len(batch))).tolist()
    return torch.stack([picture[:, r : r + 64, c : c + 64] for picture, r, c in zip(padded, rows, columns, strict=True)])


def perceptual(device: torch.device) -> torch.nn.Module:
    import lpips

    return lpips.LPIPS(net="squeeze", verbose=False).to(device).eval().requires_grad_(False)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Posterior means, (n, 16, 8, 8)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 by rewriting quant_conv and post_quant_conv."""
    z = latents_of(vae, pictures)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    c = LATENT_CHANNELS
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[c:] -= 2 * std.log()
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean).sum(1)
    vae.post_quant_conv.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(64)])
    return -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1) / 2, pictures / 2)).item()


def train(vae: AutoencoderKL, pictures: torch.Tensor, args: argparse.Namespace) -> int:
    """Train for `args.minutes`; returns the number of pictures seen."""
    frozen = [vae.encoder, vae.quant_conv] if args.decoder_only else []
    for module in frozen:
        module.requires_grad_(False)
    distance = perceptual(pictures.device)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    vae.to(memory_format=torch.channels_last)
    start, seen, lowest = time.monotonic(), 0, args.learning_rate / 50
    bar = tqdm(desc="autoencoder", unit="pictures")
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = max(lowest, args.learning_rate * min(1, seen / 2000, 2 * (1 - done)))
        batch = jitter(pictures[torch.randint(len(pictures), (args.batch,))])
        with torch.autocast(pictures.device.type, torch.bfloat16):
            posterior = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
            z = posterior.mean if args.decoder_only else posterior.sample()
            decoded = vae.decode(z).sample
            likeness = distance(decoded, batch).mean()
        loss = F.l1_loss(decoded.float(), batch) + F.mse_loss(decoded.float(), batch) + args.lpips_weight * likeness.float()
        if not args.decoder_only:
            loss = loss + args.kl_weight * posterior.kl().float().mean() / z[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seen += len(batch)
        bar.update(len(batch))
        if seen % (50 * args.batch) == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", lpips=f"{likeness.item():.4f}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/pictures.npz"))
    parser.add_argument("--out", type=Path, default=Path("build/vae"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--lpips-weight", type=float, default=0.3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder and its latents as they are")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = to_tensor(Pack.load(args.data).pictures).to(device)
    vae = (AutoencoderKL.from_pretrained(args.out) if (args.out / "config.json").exists() else build()).to(device)
    seen = train(vae, pictures, args)
    vae.to(memory_format=torch.contiguous_format).eval()
    if not args.decoder_only:
        standardise(vae, pictures)
    facts = {"images_seen": seen, "psnr": round(psnr(vae, pictures), 2), "parameters": sum(p.numel() for p in vae.parameters())}
    vae.save_pretrained(args.out, max_shard_size="9MB")  # as in assets/, of which it may be a copy
    with (args.out / "facts.jsonl").open("a") as log:
        log.write(json.dumps(facts | {"decoder_only": args.decoder_only, "minutes": args.minutes}) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
