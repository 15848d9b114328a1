"""Tiny random video models that diffusers does not have: Open-Sora 1.0's STDiT, its pipeline, and 1.2's STDiT3."""

from typing import Any

import torch
from diffusers import AutoencoderKL, CacheMixin, DDIMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from blockdance.models.opensora import OpenSoraPipeline
from blockdance.models.stdit import FeedForward, SelfAttention, STDiT, modulated

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "apple", "falls", "turns"]


def tiny_stdit(**changes: Any) -> STDiT:
    """Four blocks, of which every part has an effect."""
    torch.manual_seed(0)
    config = {
        "input_size": (2, 8, 8), "hidden_size": 16, "depth": 4, "num_heads": 2, "caption_channels": 16, "model_max_length": 5,
    }  # fmt: skip
    model = STDiT(**(config | changes))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def opensora(size: int = 8) -> OpenSoraPipeline:
    """Draws videos of 2 frames and twice as many pixels as latents."""
    transformer = tiny_stdit(input_size=(2, size, size))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    pipe = OpenSoraPipeline(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"),
        text_encoder.eval(),
        vae.eval(),
        transformer,
        DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class HalfBlock(nn.Module):
    """Attention over space or over time, and an MLP, as one block of Open-Sora 1.2."""

    def __init__(self, width: int, num_heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn = SelfAttention(width, num_heads)
        self.mlp = FeedForward(width, 2 * width, width)

    def forward(self, x: Tensor, t: Tensor, frames: int) -> Tensor:
        shift, scale, gate = t.chunk(3, dim=-1)  # (b, 1, d)
        rows = modulated(x, shift, scale).unflatten(1, (frames, -1))  # (b, T, s, d)
        rows = rows.transpose(1, 2) if self.temporal else rows
        moved = self.attn(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        x = x + gate * (moved.transpose(1, 2) if self.temporal else moved).flatten(1, 2)  # (b, T s, d)
        out: Tensor = x + gate * self.mlp(modulated(x, shift, scale))
        return out


class STDiT3(nn.Module, CacheMixin):
    """The shape of Open-Sora 1.2's transformer: spatial and temporal blocks take turns."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.out, self.time = nn.Linear(4, width), nn.Linear(width, 4), nn.Linear(1, 3 * width)
        self.spatial_blocks = nn.ModuleList(HalfBlock(width, 2, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(HalfBlock(width, 2, temporal=True) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        """Of a latent video (b, c, T, h, w) and one vector of text (b, d)."""
        t = self.time(timestep[:, None, None] / 1000) + torch.cat([y, y, y], dim=-1)[:, None]  # (b, 1, 3 d)
        hidden = self.embed(x.flatten(3).permute(0, 2, 3, 1)).flatten(1, 2)  # (b, T s, d)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            hidden = temporal(spatial(hidden, t, x.shape[2]), t, x.shape[2])
        return self.out(hidden).transpose(1, 2).reshape(x.shape)
