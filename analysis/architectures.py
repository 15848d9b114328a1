"""The paper's transformers at their true size with random weights, on which speed does not depend, in a bare sampling loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from blockdance.models.stdit import STDiT
from blockdance.presets import PRESETS, Preset

TEXT_TOKENS = 120
TEXT_WIDTH = 4096
CLASSES = 1000


@dataclass(frozen=True)
class Architecture:
    """One of the paper's transformers, and what it is called with."""

    build: Callable[[], nn.Module]
    latent: tuple[int, ...]
    """Shape of one sample."""
    conditions: Callable[[int], dict[str, Tensor]]
    """All arguments but latent and timestep, for a number of rows of the batch."""
    paper_speedup: float | None = None
    """What the paper reports for N = 2."""


def dit(size: int) -> Architecture:
    """DiT-XL/2 for latents of `size`."""

    def build() -> nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=size,
            patch_size=2, num_embeds_ada_norm=CLASSES,
        )  # fmt: skip

    def labels(rows: int) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([207] * (rows // 2) + [CLASSES] * (rows // 2))}

    return Architecture(build, (4, size, size), labels, paper_speedup=1.374 if size == 64 else None)


def pixart(size: int) -> Architecture:
    """PixArt-alpha for latents of `size`; the largest is also told resolution and aspect ratio."""
    told = size == 128

    def build() -> nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=size,
            patch_size=2, cross_attention_dim=1152, caption_channels=TEXT_WIDTH, use_additional_conditions=told,
        )  # fmt: skip

    def text(rows: int) -> dict[str, Any]:
        added = {"resolution": torch.full((rows, 2), 1024.0), "aspect_ratio": torch.ones(rows, 1)}
        none = dict.fromkeys(added)
        return {
            "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, TEXT_WIDTH),
            "encoder_attention_mask": torch.ones(rows, TEXT_TOKENS),
            "added_cond_kwargs": added if told else none,
        }

    return Architecture(build, (4, size, size), text, paper_speedup=1.254 if told else None)


def open_sora(preset: Preset) -> Architecture:
    """Open-Sora 1.0's STDiT, as the preset builds it."""

    def text(rows: int) -> dict[str, Tensor]:
        return {"y": torch.randn(rows, 1, TEXT_TOKENS, TEXT_WIDTH), "mask": torch.ones(rows, TEXT_TOKENS)}

    size = preset.transformer["input_size"]
    return Architecture(partial(STDiT, **preset.transformer), (4, *size), text, 1.348 if size[1] == 64 else None)


ARCHITECTURES = {
    "dit-xl-2-256": dit(32),
    "dit-xl-2-512": dit(64),
    "pixart-xl-2-256": pixart(32),
    "pixart-xl-2-512": pixart(64),
    "pixart-xl-2-1024": pixart(128),
    **{name: open_sora(preset) for name, preset in PRESETS.items() if preset.checkpoint},
}
"""By the names of the presets, whose settings they are measured with."""


class Sampler:
    """A transformer and a scheduler in the loop that all pipelines share, with guidance as one batch of twice the rows.

    There is no text encoder and no decoder: what is timed is the sampling loop.
    """

    def __init__(self, transformer: Any, scheduler: Any, latent: Tensor, conditions: dict[str, Any], guidance: float) -> None:
        self.transformer = transformer
        self.scheduler = scheduler
        self.latent = latent
        self.conditions = conditions
        self.guidance = guidance

    @torch.no_grad()
    def __call__(self, steps: int) -> Tensor:
        """The latents after that many steps, on the CPU, so that the device has finished."""
        latent = self.latent
        self.scheduler.set_timesteps(steps, device=latent.device)
        for timestep in self.scheduler.timesteps:
            rows = torch.cat([latent, latent])
            put_out = self.transformer(rows, timestep=timestep.expand(len(rows)), **self.conditions)
            predicted = put_out if isinstance(put_out, Tensor) else put_out.sample
            noise, other = predicted.chunk(2, dim=1)[0].chunk(2)
            latent = self.scheduler.step(other + self.guidance * (noise - other), timestep, latent).prev_sample
        return latent.cpu()


def with_random_weights(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The architecture with small random weights, made without ever initialising it properly, which takes minutes."""
    with torch.device("meta"):
        model = build()
    model = nn.Module.to(model, dtype).to_empty(device=device).eval().requires_grad_(False)
    for weight in chain(model.parameters(), model.buffers()):
        if weight.is_floating_point():
            weight.normal_(std=0.02)
    return model


def sampler_for(name: str, model: Any, batch: int) -> Sampler:
    """Everything in place for `batch` samples."""
    architecture, preset, weight = ARCHITECTURES[name], PRESETS[name], next(model.parameters())
    conditions = placed(architecture.conditions(2 * batch), weight)
    solver = DPMSolverMultistepScheduler if preset.sampler == "DPM-Solver++" else DDIMScheduler
    latent = torch.randn(batch, *architecture.latent).to(weight)
    return Sampler(model, solver(beta_start=0.0001, beta_end=0.02), latent, conditions, preset.guidance)


def placed(conditions: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """The tensors on the device, floating ones in the dtype of `like`."""
    moved: dict[str, Any] = {}
    for name, value in conditions.items():
        if isinstance(value, dict):
            moved[name] = placed(value, like)
        elif isinstance(value, Tensor):
            moved[name] = value.to(like.device, like.dtype if value.is_floating_point() else None)
        else:
            moved[name] = value
    return moved
