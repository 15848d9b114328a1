"""Open-Sora 1.0's STDiT: attention over space, over time and to the text in every block.

Written from the architecture, with the key names of the published checkpoints (`hpcai-tech/Open-Sora`).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid, get_timestep_embedding
from safetensors.torch import load_file
from torch import Tensor, nn

from blockdance.errors import UnsupportedModelError
from blockdance.paths import AnyPath

FREQUENCIES = 256
"""Numbers that a timestep is first spread over."""
POSITIONS = ("pos_embed", "pos_embed_temporal")
"""Buffers that follow from the constructor's arguments."""


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """(b, n, d) -> (b, heads, n, d / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention among the tokens of each row, (b, n, d) -> (b, n, d)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            heads_of(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1)
        )  # (b, heads, n, d / heads)
        attended: Tensor = F.scaled_dot_product_attention(query, key, value)  # (b, heads, n, d / heads)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))  # (b, n, d)
        return out


class CrossAttention(nn.Module):
    """Attention from the video's tokens to the text's."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Of x (b, n, d) to y (b, m, d), of which `mask` (b, 1, 1, m) keeps the true ones."""
        query = heads_of(self.q_linear(x), self.num_heads)  # (b, heads, n, d / heads)
        key, value = (heads_of(part, self.num_heads) for part in self.kv_linear(y).chunk(2, dim=-1))  # (b, heads, m, d / heads)
        attended: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (b, heads, n, d / heads)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))  # (b, n, d)
        return out


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The normalised x (b, n, d), shifted and scaled by (b, 1, d)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class STDiTBlock(nn.Module):
    """Space, time, text and MLP, each added to the hidden state."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads)
        self.attn_temp = SelfAttention(width, num_heads)
        self.cross_attn = CrossAttention(width, num_heads)
        self.mlp = FeedForward(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, mask: Tensor | None, frames: int, frame_positions: Tensor | None = None
    ) -> Tensor:
        """The next hidden state.

        Args:
            x: (b, frames * s, d), frame by frame.
            y: the text, (b, m, d).
            t: the timestep's six modulations, (b, 6, d).
            mask: (b, 1, 1, m), true where a token is kept.
            frames: T.
            frame_positions: (1, T, d), added to what the temporal attention sees (in the first block only).
        """
        modulations = (self.scale_shift_table + t).chunk(6, dim=1)  # six of (b, 1, d)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulations
        batch = len(x)
        in_frames = modulated(x, shift_attention, scale_attention).unflatten(1, (frames, -1)).flatten(0, 1)  # (b T, s, d)
        x = x + gate_attention * self.attn(in_frames).unflatten(0, (batch, frames)).flatten(1, 2)  # (b, T s, d)
        along_time = x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # (b s, T, d)
        if frame_positions is not None:
            along_time = along_time + frame_positions
        moved = self.attn_temp(along_time).unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)  # (b, T s, d)
        x = x + gate_attention * moved
        x = x + self.cross_attn(x, y, mask)
        out: Tensor = x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))
        return out


class PatchEmbedder(nn.Module):
    """Cuts the video into patches, (b, c, f, h, w) -> (b, d, T, H, W)."""

    def __init__(self, patch_size: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class TimestepEmbedder(nn.Module):
    """(b,) -> (b, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        waves = get_timestep_embedding(timestep, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)  # (b, 256)
        out: Tensor = self.mlp(waves.to(self.mlp[0].weight.dtype))
        return out


class CaptionEmbedder(nn.Module):
    """(b, 1, m, caption channels) -> (b, 1, m, d); keeps the caption of no caption, for guidance."""

    y_embedding: Tensor

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = FeedForward(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.y_proj(y)
        return out


class FinalLayer(nn.Module):
    """(b, n, d) -> (b, n, numbers per patch)."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, numbers)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)  # (b, 1, d)
        out: Tensor = self.linear(modulated(x, shift, scale))
        return out


def sincos(width: int, positions: Tensor) -> Tensor:
    """Sines, then cosines, of positions (n,): (n, width)."""
    return get_1d_sincos_pos_embed_from_grid(width, positions, output_type="pt").float()


class STDiT(ModelMixin, ConfigMixin, CacheMixin):
    """The transformer of Open-Sora 1.0, predicting noise and its variance for a latent video.

    Args:
        input_size: frames, height and width of the latent video it was made for; a call may have others.
        in_channels: of the latent video.
        patch_size: frames, height and width of a patch.
        hidden_size: d; divisible by 4 and by `num_heads`.
        depth: L, blocks.
        num_heads: of every attention.
        caption_channels: of the text encoder.
        model_max_length: text tokens, at most.
        space_scale: positions of patches are divided by it.
        time_scale: positions of frames are divided by it.

    Raises:
        UnsupportedModelError: the input is not a whole number of patches, or the width not of heads.
    """

    _repeated_blocks = ["STDiTBlock"]  # noqa: RUF012 (diffusers' way to say which blocks compile alike)
    _no_split_modules = ["STDiTBlock"]  # noqa: RUF012
    pos_embed: Tensor
    pos_embed_temporal: Tensor

    @register_to_config
    def __init__(
        self,
        input_size: tuple[int, int, int] = (16, 32, 32),
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        caption_channels: int = 4096,
        model_max_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % num_heads:
            raise UnsupportedModelError(f"hidden_size must be divisible by 4 and by num_heads {num_heads}, got {hidden_size}")
        self.patch_size: tuple[int, int, int] = (patch_size[0], patch_size[1], patch_size[2])
        self.x_embedder = PatchEmbedder(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        blocks = [STDiTBlock(hidden_size, num_heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.out_channels = 2 * in_channels
        numbers = self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.out_channels
        self.final_layer = FinalLayer(hidden_size, numbers)
        frames, height, width = self.patches(tuple(input_size))
        self.register_buffer("pos_embed", self.space_positions(height, width))
        self.register_buffer("pos_embed_temporal", self.frame_positions(frames))
        for layer in [self.final_layer.linear, *(attention.proj for block in blocks for attention in late(block))]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def patches(self, size: tuple[int, ...]) -> tuple[int, int, int]:
        """How many patches a video of that many frames, rows and columns has, along each of them.

        Raises:
            UnsupportedModelError: it is not a whole number.
        """
        if any(length < 1 or length % patch for length, patch in zip(size, self.patch_size, strict=True)):
            raise UnsupportedModelError(
                f"frames, height and width of the latent must be multiples of the patch {self.patch_size}, got {tuple(size)}"
            )
        frames, height, width = (length // patch for length, patch in zip(size, self.patch_size, strict=True))
        return frames, height, width

    def space_positions(self, height: int, width: int) -> Tensor:
        """(1, height * width, d): half of the numbers tell the column, half the row."""
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        half, scale = self.config.hidden_size // 2, self.config.space_scale
        embedded = [sincos(half, place.flatten() / scale) for place in (column, row)]
        return torch.cat(embedded, dim=1)[None]

    def frame_positions(self, frames: int) -> Tensor:
        """(1, frames, d)."""
        return sincos(self.config.hidden_size, torch.arange(frames) / self.config.time_scale)[None]

    def positions_for(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Space and frame positions: the stored ones if this is the size the model was made for."""
        space, time = self.pos_embed, self.pos_embed_temporal
        if (frames, height, width) != self.patches(tuple(self.config.input_size)):
            space, time = self.space_positions(height, width).to(space), self.frame_positions(frames).to(time)
        return space, time

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predict the noise and its variance.

        Args:
            x: latent video, (b, c, frames, height, width), of any size that is a whole number of patches.
            timestep: (b,).
            y: the text encoder's output, (b, 1, m, caption channels).
            mask: (b, m) or, for guidance, (b / 2, m); 1 where a token is kept, at least one in each row. None keeps all.

        Returns:
            (b, 2 c, frames, height, width).

        Raises:
            UnsupportedModelError: the size is not a whole number of patches.
        """
        frames, height, width = self.patches(tuple(x.shape[2:]))
        space, time = self.positions_for(frames, height, width)
        x = self.x_embedder(x.to(self.dtype)).flatten(3).permute(0, 2, 3, 1)  # (b, T, H W, d)
        x = (x + space.to(x.dtype)).flatten(1, 2)  # (b, T H W, d)
        t = self.t_embedder(timestep)  # (b, d)
        modulations = self.t_block(t).unflatten(1, (6, -1))  # (b, 6, d)
        text = self.y_embedder(y.to(self.dtype)).squeeze(1)  # (b, m, d)
        if mask is not None:
            mask = mask.bool().repeat(len(text) // len(mask), 1)[:, None, None]  # (b, 1, 1, m)
        for index, block in enumerate(self.blocks):
            x = block(x, text, modulations, mask, frames, time.to(x.dtype) if index == 0 else None)  # (b, T H W, d)
        return self.unpatchified(self.final_layer(x, t), (frames, height, width))

    def unpatchified(self, x: Tensor, patches: tuple[int, int, int]) -> Tensor:
        """(b, T H W, numbers) -> (b, channels, frames, height, width)."""
        x = x.unflatten(2, (*self.patch_size, self.out_channels)).unflatten(1, patches)  # (b, T, H, W, pt, ph, pw, c)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (b, c, T, pt, H, ph, W, pw)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (b, c, frames, height, width)

    def load_original(self, file: AnyPath) -> None:
        """Load a checkpoint with the original's key names: `.safetensors`, or a torch file, read without unpickling code.

        Positions are left out, since they follow from the constructor's arguments.

        Raises:
            UnsupportedModelError: keys are missing or left over, or shapes differ.
        """
        file = Path(file)
        stored: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        weights = {key.removeprefix("module."): value for key, value in stored.items()}
        for name in POSITIONS:
            weights[name] = getattr(self, name)
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UnsupportedModelError(f"{file.name} is not a checkpoint of this STDiT: {reason[:200]}") from error


def late(block: STDiTBlock) -> tuple[SelfAttention, CrossAttention]:
    """The parts that start without effect, as in the original: a picture model learns time and text."""
    return block.attn_temp, block.cross_attn
