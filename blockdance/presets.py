"""The paper's models by short names, with the paper's settings, and any diffusers pipeline in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from blockdance.demo import load_demo_pipeline
from blockdance.errors import UnsupportedModelError
from blockdance.schedule import ReuseConfig

DEMO = "demo"
"""The model in the box."""


@dataclass(frozen=True)
class Preset:
    """A published model with the window, cutoff and sampler the paper names; the paper does not name the steps for certain."""

    repository: str
    """On the Hugging Face hub."""
    config: ReuseConfig
    sampler: str
    """A key of `analysis.experiment.SAMPLERS`."""
    steps: int
    guidance: float


DIT = ReuseConfig(reuse_interval=2, cutoff_block=20, window_start=0.25, window_end=0.95)
PIXART = ReuseConfig(reuse_interval=2, cutoff_block=20, window_start=0.40, window_end=0.95)
PRESETS = {
    "dit-xl-2-256": Preset("facebook/DiT-XL-2-256", DIT, "DDIM", 50, 4.0),
    "dit-xl-2-512": Preset("facebook/DiT-XL-2-512", DIT, "DDIM", 50, 4.0),
    "pixart-xl-2-256": Preset("PixArt-alpha/PixArt-XL-2-256x256", PIXART, "DPM-Solver++", 30, 4.5),
    "pixart-xl-2-512": Preset("PixArt-alpha/PixArt-XL-2-512x512", PIXART, "DPM-Solver++", 30, 4.5),
    "pixart-xl-2-1024": Preset("PixArt-alpha/PixArt-XL-2-1024-MS", PIXART, "DPM-Solver++", 30, 4.5),
}


def load_pipeline(model: str) -> Any:
    """A pipeline by the name of a preset, `demo`, or the folder of a saved one; in half precision on the GPU, if there is one.

    Raises:
        UnsupportedModelError: no such name or folder, or the model is neither downloaded nor within reach.
    """
    if model == DEMO:
        return load_demo_pipeline()
    if model not in PRESETS and not (Path(model) / "model_index.json").is_file():
        names = ", ".join([DEMO, *PRESETS])
        raise UnsupportedModelError(f"model must be one of {names}, or a folder with a diffusers pipeline, got {model!r}")
    source = PRESETS[model].repository if model in PRESETS else model
    on_gpu = torch.cuda.is_available()
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.float16 if on_gpu else torch.float32)
    except OSError as error:
        raise UnsupportedModelError(
            f"{source} is not on this machine and the Hugging Face hub cannot be reached or refuses it; run "
            f"`hf download {source}` where it can, or give the folder of a copy"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if on_gpu else pipe
