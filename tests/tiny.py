"""Tiny random pipelines of every supported class, built offline, and ways to drive them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor

BLOCKS = 6
STEPS = 10


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def dit(size: int = 8) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=BLOCKS, sample_size=size,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return quiet(DiTPipeline(transformer.eval(), vae().eval(), DDIMScheduler()))


def pixart() -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=BLOCKS, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.scale_shift_table)
    return quiet(PixArtAlphaPipeline(None, None, vae().eval(), transformer.eval(), DDIMScheduler()))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_dit(pipe: Any, steps: int = STEPS, seed: int = 0, guided: bool = True, batch: int = 1, **_: Any) -> Tensor:
    with torch.no_grad():
        pictures = pipe(
            list(range(1, batch + 1)), num_inference_steps=steps, generator=torch.Generator().manual_seed(seed),
            guidance_scale=4.0 if guided else 1.0, output_type="np",
        ).images  # fmt: skip
    return torch.from_numpy(pictures)


def run_pixart(
    pipe: Any, steps: int = STEPS, seed: int = 0, guided: bool = True, batch: int = 1, size: int = 8, callback: Any = None
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2 * batch, 5, 12, generator=generator)
    mask = torch.ones(batch, 5, dtype=torch.long)
    return pipe(
        prompt=None, negative_prompt=None, prompt_embeds=text[:batch], prompt_attention_mask=mask,
        negative_prompt_embeds=text[batch:], negative_prompt_attention_mask=mask, num_inference_steps=steps, height=size,
        width=size, guidance_scale=4.0 if guided else 1.0, generator=torch.Generator().manual_seed(seed),
        output_type="latent", use_resolution_binning=False, callback=callback,
    ).images  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A supported class: how to build a tiny pipeline and how to call it, returning the result as one tensor."""

    name: str
    build: Callable[[], Any]
    run: Callable[..., Tensor]

    def inputs(self, batch: int = 2) -> dict[str, Any]:
        """Arguments for one direct call of the transformer."""
        common: dict[str, Any] = {"hidden_states": torch.randn(batch, 4, 8, 8), "timestep": torch.full((batch,), 500)}
        if self.name == "dit":
            return common | {"class_labels": torch.arange(batch)}
        return common | {"encoder_hidden_states": torch.randn(batch, 5, 12), "added_cond_kwargs": {}}


CASES = [Case("dit", dit, run_dit), Case("pixart", pixart, run_pixart)]
