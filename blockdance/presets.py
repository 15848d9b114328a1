"""The models in the box and the paper's by short names, with their settings, and any diffusers pipeline in a folder."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from huggingface_hub import constants, hf_hub_download
from transformers import AutoTokenizer, T5EncoderModel

from blockdance.demo import load_demo_pipeline, load_demo_video_pipeline
from blockdance.errors import UnsupportedModelError
from blockdance.models.opensora import OpenSoraPipeline
from blockdance.models.stdit import STDiT
from blockdance.schedule import ReuseConfig

DEMO = "demo"
"""The picture model in the box."""
DEMO_VIDEO = "demo-video"
"""The video model in the box."""


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
    checkpoint: str | None = None
    """File in the repository, where it holds no diffusers pipeline but the transformer alone."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """What that transformer is built with."""


DIT = ReuseConfig(reuse_interval=2, cutoff_block=20, window_start=0.25, window_end=0.95)
PIXART = ReuseConfig(reuse_interval=2, cutoff_block=20, window_start=0.40, window_end=0.95)
OPEN_SORA = ReuseConfig(reuse_interval=2, cutoff_block=20, window_start=0.25, window_end=0.95)
T5 = "DeepFloyd/t5-v1_1-xxl"
FRAME_DECODER = "stabilityai/sd-vae-ft-ema"
REACH_SECONDS = 3.0
"""How long to wait for the hub before doing without."""
PRESETS = {
    "dit-xl-2-256": Preset("facebook/DiT-XL-2-256", DIT, "DDIM", 50, 4.0),
    "dit-xl-2-512": Preset("facebook/DiT-XL-2-512", DIT, "DDIM", 50, 4.0),
    "pixart-xl-2-256": Preset("PixArt-alpha/PixArt-XL-2-256x256", PIXART, "DPM-Solver++", 30, 4.5),
    "pixart-xl-2-512": Preset("PixArt-alpha/PixArt-XL-2-512x512", PIXART, "DPM-Solver++", 30, 4.5),
    "pixart-xl-2-1024": Preset("PixArt-alpha/PixArt-XL-2-1024-MS", PIXART, "DPM-Solver++", 30, 4.5),
    "open-sora-1.0-16x256x256": Preset(
        "hpcai-tech/Open-Sora", OPEN_SORA, "DDIM", 50, 7.0, "OpenSora-v1-HQ-16x256x256.pth",
        {"input_size": (16, 32, 32), "space_scale": 0.5},
    ),
    "open-sora-1.0-16x512x512": Preset(
        "hpcai-tech/Open-Sora", OPEN_SORA, "DDIM", 50, 7.0, "OpenSora-v1-HQ-16x512x512.pth", {"input_size": (16, 64, 64)},
    ),
}  # fmt: skip
IN_THE_BOX: dict[str, Callable[[], Any]] = {DEMO: load_demo_pipeline, DEMO_VIDEO: load_demo_video_pipeline}


def config_for(model: str) -> ReuseConfig:
    """The paper's for that model; of the video model in the box the paper's for video; else the defaults."""
    if model == DEMO_VIDEO:
        return replace(OPEN_SORA, cutoff_block=None)
    return PRESETS[model].config if model in PRESETS else ReuseConfig()


def load_pipeline(model: str) -> Any:
    """A pipeline by name, or from the folder of a saved one; in half precision on the GPU, if there is one.

    Args:
        model: a key of `IN_THE_BOX`, which stay in float32 on the CPU, or of `PRESETS`, or a folder.

    Raises:
        UnsupportedModelError: no such name or folder, or the model is neither downloaded nor within reach.
    """
    if model in IN_THE_BOX:
        return IN_THE_BOX[model]()
    if model not in PRESETS and not (Path(model) / "model_index.json").is_file():
        names = ", ".join([*IN_THE_BOX, *PRESETS])
        raise UnsupportedModelError(f"model must be one of {names}, or a folder with a diffusers pipeline, got {model!r}")
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    preset = PRESETS.get(model)
    if preset is not None and preset.checkpoint:
        pipe = from_hub(f"{preset.repository}, {T5} or {FRAME_DECODER}", partial(load_open_sora, preset, dtype))
    else:
        source = preset.repository if preset else model
        pipe = from_hub(source, partial(pipeline_class(Path(source)).from_pretrained, source, dtype=dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if on_gpu else pipe


def from_hub(source: str, load: Callable[..., Any]) -> Any:
    """What `load` gets, which is asked to do without the hub if that does not answer at once.

    Raises:
        UnsupportedModelError: it is neither downloaded nor within reach, or cannot be loaded.
    """
    try:
        return load(local_files_only=not hub_answers())
    except OSError as error:
        raise UnsupportedModelError(
            f"{source} is not on this machine and the Hugging Face hub cannot be reached or refuses it; run "
            f"`hf download {source.split(',')[0]}` where it can, or give the folder of a copy"
        ) from error
    except (ImportError, MemoryError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(f"{source} cannot be loaded: {reason[0][:200]}") from error


def hub_answers() -> bool:
    """Whether the hub can be reached; asking first spares the user half a minute of retries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def pipeline_class(folder: Path) -> Any:
    """Of the pipeline in a folder; diffusers knows its own classes only. What is not a folder is left to diffusers."""
    index = folder / "model_index.json"
    ours = index.is_file() and json.loads(index.read_text()).get("_class_name") == OpenSoraPipeline.__name__
    return OpenSoraPipeline if ours else DiffusionPipeline


def load_open_sora(preset: Preset, dtype: torch.dtype, local_files_only: bool) -> OpenSoraPipeline:
    """Open-Sora 1.0 from its published checkpoint, with the text encoder and the autoencoder it was trained with."""
    assert preset.checkpoint is not None
    here: dict[str, Any] = {"local_files_only": local_files_only}
    file = Path(hf_hub_download(preset.repository, preset.checkpoint, **here))
    transformer = STDiT(**preset.transformer)
    transformer.load_original(file)
    return OpenSoraPipeline(
        AutoTokenizer.from_pretrained(T5, **here),
        T5EncoderModel.from_pretrained(T5, dtype=dtype, **here),
        AutoencoderKL.from_pretrained(FRAME_DECODER, torch_dtype=dtype, **here),
        transformer.to(dtype).eval(),
        DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True),
    )
