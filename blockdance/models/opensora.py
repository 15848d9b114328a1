"""Open-Sora 1.0 as a diffusers pipeline: T5 reads the prompt, STDiT denoises latents, the autoencoder draws each frame."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from blockdance.errors import ConfigError
from blockdance.models.stdit import STDiT

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass
class OpenSoraOutput(BaseOutput):
    """What a call returns."""

    frames: Any
    """Per prompt a list of PIL images; or as `np` float32 (b, frames, height, width, 3) in [0, 1]; or the latents."""


class OpenSoraPipeline(DiffusionPipeline):
    """Text to video with STDiT.

    Args:
        tokenizer: of the text encoder.
        text_encoder: T5; its width is the transformer's `caption_channels`.
        vae: draws one frame at a time.
        transformer: Open-Sora 1.0's.
        scheduler: DDIM, or DDPM with `variance_type="learned_range"`, which is the original's IDDPM.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: STDiT,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along height and width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> OpenSoraOutput | tuple[Any]:
        """Draw one video for each prompt.

        Args:
            prompt: one or several texts.
            num_frames: of the video; the one the transformer was made for by default, as are height and width.
            height: in pixels, a multiple of latent scale times patch.
            width: as height.
            num_inference_steps: at least 1.
            guidance_scale: at least 1, which is without guidance.
            generator: of the noise.
            latents: the noise itself, (b, c, frames, height, width) of latents.
            output_type: "pil", "np" or "latent".
            return_dict: False gives a tuple of one.

        Raises:
            ConfigError: a value outside its range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        guided = guidance_scale > 1
        size = self.latent_size(num_frames, height, width)
        check(prompts, num_inference_steps, guidance_scale, output_type)
        device = self._execution_device
        text, mask = self.encode_prompt(prompts, device)
        if guided:  # the conditional half first; both see as many text tokens, as in the original
            text = torch.cat([text, self.null_text(len(prompts), text)])
        latent = self.noise(len(prompts), size, generator, latents, text)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([latent, latent]) if guided else latent
            model_input = self.scheduler.scale_model_input(model_input, timestep)
            moments = timestep.expand(len(model_input)).to(device)
            predicted = self.transformer(model_input, moments, text, mask)
            predicted = self.guided(predicted, guidance_scale) if guided else predicted
            latent = self.scheduler.step(self.for_scheduler(predicted), timestep, latent, **extra).prev_sample
        frames = latent if output_type == "latent" else self.draw(latent, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraOutput(frames=frames) if return_dict else (frames,)

    def latent_size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Frames, height and width of the latent video.

        Raises:
            ConfigError: not a whole number of patches.
        """
        made_for, patch, scale = self.transformer.config.input_size, self.transformer.config.patch_size, self.vae_scale_factor
        units = (patch[0], patch[1] * scale, patch[2] * scale)
        sizes = (num_frames or made_for[0], height or made_for[1] * scale, width or made_for[2] * scale)
        for name, size, unit in zip(("num_frames", "height", "width"), sizes, units, strict=True):
            if size < 1 or size % unit:
                raise ConfigError(f"{name} must be a multiple of {unit}, got {size}")
        return sizes[0], sizes[1] // scale, sizes[2] // scale

    def encode_prompt(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """The text encoder's output (b, 1, tokens, channels), and which tokens count, (b, tokens)."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.transformer.config.model_max_length,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device)
        encoded = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return encoded[:, None].to(self.transformer.dtype), tokens.attention_mask

    def null_text(self, count: int, text: Tensor) -> Tensor:
        """What guidance leads away from, as learned: (b, 1, tokens, channels)."""
        return self.transformer.y_embedder.y_embedding.to(text).expand(count, 1, -1, -1)

    def noise(self, count: int, size: tuple[int, int, int], generator: Any, latents: Tensor | None, like: Tensor) -> Tensor:
        """The latent video to start from.

        Raises:
            ConfigError: given latents have another shape.
        """
        shape = (count, self.transformer.config.in_channels, *size)
        if latents is None:
            latents = randn_tensor(shape, generator, like.device, like.dtype)
        elif latents.shape != shape:
            raise ConfigError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        scaled: Tensor = latents.to(like) * self.scheduler.init_noise_sigma
        return scaled

    def guided(self, predicted: Tensor, scale: float) -> Tensor:
        """Guidance of the noise, with the variance of the conditional half: (2 b, 2 c, ...) -> (b, 2 c, ...)."""
        conditional, unconditional = predicted.chunk(2)
        noise, variance = conditional.chunk(2, dim=1)
        away = unconditional.chunk(2, dim=1)[0]
        return torch.cat([away + scale * (noise - away), variance], dim=1)

    def for_scheduler(self, predicted: Tensor) -> Tensor:
        """Without the variance, unless the scheduler takes it."""
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        return predicted if learned else predicted.chunk(2, dim=1)[0]

    def draw(self, latent: Tensor, output_type: str) -> Any:
        """Decode one frame at a time, so that memory does not grow with their number."""
        latent = latent.to(self.vae.dtype) / self.vae.config.scaling_factor
        videos = [
            torch.cat([self.vae.decode(video[None, :, frame]).sample for frame in range(video.shape[1])]) for video in latent
        ]
        pixels = ((torch.stack(videos).float() / 2 + 0.5).clamp(0, 1)).permute(0, 1, 3, 4, 2).cpu().numpy()  # (b, T, h, w, 3)
        if output_type == "np":
            return pixels
        return [self.numpy_to_pil(np.asarray(video)) for video in pixels]


def check(prompts: list[str], num_inference_steps: int, guidance_scale: float, output_type: str) -> None:
    """Raise ConfigError if one of a call's arguments is outside its range."""
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ConfigError(f"prompt must be one or more texts that are not empty, got {prompts!r}")
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if guidance_scale < 1:
        raise ConfigError(f"guidance_scale must be at least 1, got {guidance_scale}")
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
