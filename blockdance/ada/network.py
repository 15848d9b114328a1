"""The decision network (Sec. 3.3): from the latent and the text, how probable a cache step is on every remaining step."""

import math
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from blockdance.policy import Moment

FRACTION_WAVES = 5
"""Octaves in which a step's place in the run is written."""
PERIODS = (2, 3, 4, 6)
"""In steps; so that a network can say "every second step", for any number of steps."""
STEP_FEATURES = 2 * FRACTION_WAVES + 2 * len(PERIODS) + 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a decision network; all but the first three are free."""

    channels: int
    """Of the latent."""
    text_width: int | None
    """Numbers per word of the text embedding; None without text."""
    cutoffs: int
    """How many blocks the second head chooses among; with 1 there is none."""
    patch: int = 1
    """Side of the square of latent pixels that becomes one token."""
    width: int = 128
    heads: int = 4
    blocks: int = 3
    """As in the paper."""


class DecisionNetwork(nn.Module):
    """Three transformer blocks over the latent's patches, the words, and one token for each step to decide on; then an MLP."""

    def __init__(self, shape: Shape, side: int) -> None:
        super().__init__()
        self.shape = shape
        self.latent = PatchEmbed(side, side, shape.patch, shape.channels, shape.width)
        self.text = None if shape.text_width is None else nn.Linear(shape.text_width, shape.width)
        self.step = nn.Sequential(nn.Linear(STEP_FEATURES, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width))
        self.saving = nn.Sequential(nn.Linear(1, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width))
        block = nn.TransformerEncoderLayer(
            shape.width, shape.heads, 4 * shape.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, shape.blocks, nn.LayerNorm(shape.width), enable_nested_tensor=False)
        outputs = 1 + (shape.cutoffs if shape.cutoffs > 1 else 0)
        self.head = nn.Sequential(nn.Linear(shape.width, shape.width), nn.GELU(), nn.Linear(shape.width, outputs))

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are brought there."""
        return next(self.parameters()).device

    def forward(self, moment: Moment, first: int, saving: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of a cache step, and of each cutoff, for every step from `first` on.

        Args:
            moment: what is seen, b samples.
            first: the first step to decide on.
            saving: wanted share of reuse among the remaining steps, in [0, 1], (b,).

        Returns:
            (b, steps) and (b, steps, cutoffs).
        """
        latent = self._latent_tokens(moment.latent)
        words, padding = self._word_tokens(moment, latent)
        places = step_features(first, moment.num_steps).to(latent)
        steps = self.step(places)[None] + self.saving(4 * (saving.to(latent)[:, None] - 0.5))[:, None]
        tokens = torch.cat([latent, words, steps], dim=1)
        seen = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        seen[:, latent.shape[1] : latent.shape[1] + words.shape[1]] = padding
        logits = self.head(self.blocks(tokens, src_key_padding_mask=seen)[:, -steps.shape[1] :])
        cutoffs = logits[..., 1:] if self.shape.cutoffs > 1 else torch.zeros_like(logits)
        return logits[..., 0], cutoffs

    def _latent_tokens(self, latent: Tensor) -> Tensor:
        """Of a picture (b, c, h, w), or of all frames of a video (b, c, f, h, w)."""
        latent = latent.to(self.device, torch.float32)
        if latent.ndim == 4:
            embedded: Tensor = self.latent(latent)
            return embedded
        frames: Tensor = self.latent(latent.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(latent), -1)).flatten(1, 2)

    def _word_tokens(self, moment: Moment, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(b, words, width), and which of them are padding."""
        if self.text is None or moment.text is None:
            return latent[:, :0], torch.zeros(len(latent), 0, dtype=torch.bool, device=latent.device)
        words: Tensor = self.text(moment.text.to(latent))
        if moment.text_mask is None:
            return words, torch.zeros(words.shape[:2], dtype=torch.bool, device=latent.device)
        return words, moment.text_mask.reshape(words.shape[:2]).to(latent.device) == 0


def step_features(first: int, num_steps: int) -> Tensor:
    """What tells the steps from `first` on apart: their place in the run, and where they are in cycles of a few steps."""
    step = torch.arange(first, num_steps, dtype=torch.float32)
    fraction, count = step / num_steps, step - first
    angles = [math.pi * 2**octave * fraction for octave in range(FRACTION_WAVES)]
    angles += [2 * math.pi * count / period for period in PERIODS]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.stack([*waves, torch.full_like(step, 10 / num_steps), (count == 0).float()], dim=-1)
