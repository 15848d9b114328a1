"""What the tiny models of the zoo are made of: how one is built, and inputs for a call of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TEXT = 5
"""Tokens of text."""
WIDTH = 16
"""Numbers per token of text, and of everything else whose size does not matter."""
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
IMAGE = (4, 8, 8)
VIDEO = (4, 2, 8, 8)
WORDS = (TEXT, WIDTH)


@dataclass(frozen=True)
class Tiny:
    """A class, how to build a tiny one, and what to call it with."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    """Arguments of one call at a batch size, the same each time; the output has the shape of the latent among them."""
    num_blocks: int = 4
    latent: str = "hidden_states"


def awake(model: nn.Module) -> nn.Module:
    """Give every parameter that starts at zero (gates, output layers) random values, so that all blocks matter."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny(name: str, config: dict[str, Any], num_blocks: int = 4, **inputs: Any) -> Tiny:
    """Of a diffusers class; an input is the shape of one sample's tensor (a tuple), or a function of the batch size."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return awake(getattr(diffusers, name)(**config))

    def arguments(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        return {
            key: torch.randn(batch, *what, generator=generator) if isinstance(what, tuple) else what(batch)
            for key, what in ({"timestep": moments} | inputs).items()
        }

    return Tiny(name, build, arguments, num_blocks)


def moments(batch: int) -> Tensor:
    return torch.full((batch,), 500.0)


def kept(batch: int) -> Tensor:
    """A mask of text tokens that drops the last."""
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[:, -1] = False
    return mask


def all_kept(batch: int) -> Tensor:
    return torch.ones(batch, TEXT, dtype=torch.bool)


def positions(tokens: int, axes: int = 3) -> Callable[[int], Tensor]:
    """Coordinates of tokens for rotary embeddings, which samples share."""
    return lambda _: torch.arange(tokens * axes).reshape(tokens, axes) % tokens


def pairs(*values: float) -> Callable[[int], Tensor]:
    """The same numbers for every sample."""
    return lambda batch: torch.tensor([values] * batch)


def rotary(tokens: int, width: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Cosines and sines of rotary embeddings, which samples share."""
    angles = torch.arange(tokens * width, dtype=torch.float32).reshape(tokens, width)
    return lambda _: (angles.cos(), angles.sin())


def rotary_3d(*sizes: int) -> tuple[Any, Any]:
    """Allegro's: cosines and sines by coordinate for each of the three axes, and every token's coordinates."""
    angles = [torch.arange(size * 4.0).reshape(size, 4) for size in sizes]
    places = torch.cartesian_prod(*map(torch.arange, sizes))  # (tokens, 3)
    return tuple((angle.cos(), angle.sin()) for angle in angles), tuple(places.T[:, None])
