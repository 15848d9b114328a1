"""The models in the box and the paper's by short names, with their settings, and any diffusers pipeline in a folder."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from huggingface_hub import constants, hf_hub_download
from transformers import AutoTokenizer, T5EncoderModel

from blockdance.demo import load_demo_pipeline, load_demo_styles_pipeline, load_demo_video_pipeline
from blockdance.errors import UnsupportedModelError
from blockdance.models.opensora import OpenSoraPipeline
from blockdance.models.stdit import STDiT
from blockdance.paths import AnyPath
from blockdance.schedule import ReuseConfig

DEMO = "demo"
"""The picture model in the box."""
DEMO_STYLES = "demo-styles"
"""The one that draws more subjects, in three styles."""
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
IN_THE_BOX: dict[str, Callable[[], Any]] = {
    DEMO: load_demo_pipeline,
    DEMO_STYLES: load_demo_styles_pipeline,
    DEMO_VIDEO: load_demo_video_pipeline,
}


def config_for(model: str) -> ReuseConfig:
    """The paper's for that model; of the video model in the box the paper's for video; else the defaults."""
    if model == DEMO_VIDEO:
        return replace(OPEN_SORA, cutoff_block=None)
    return PRESETS[model].config if model in PRESETS else ReuseConfig()


def load_pipeline(model: AnyPath) -> Any:
    """A pipeline by name, or from the folder of a saved one; in half precision on the GPU, if there is one.

    Args:
        model: a key of `IN_THE_BOX`, which stay in float32 on the CPU, or of `PRESETS`, or a folder; what is no string is one.

    Raises:
        UnsupportedModelError: no such name or folder, the model is neither downloaded nor within reach, or it is broken.
    """
    named = model if isinstance(model, str) else None
    if named in IN_THE_BOX:
        return IN_THE_BOX[named]()
    preset = PRESETS.get(named) if named else None
    if preset is None and not (Path(model) / "model_index.json").is_file():
        names = ", ".join([*IN_THE_BOX, *PRESETS])
        raise UnsupportedModelError(
            f"model must be one of {names}, or a folder with a diffusers pipeline, got {os.fspath(model)!r}"
        )
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    if preset is not None and preset.checkpoint:
        pipe = from_hub([preset.repository, T5, FRAME_DECODER], partial(load_open_sora, preset, dtype))
    elif preset is not None and not Path(preset.repository).is_dir():
        pipe = from_hub([preset.repository], partial(DiffusionPipeline.from_pretrained, preset.repository, dtype=dtype))
    else:
        pipe = from_folder(preset.repository if preset else model, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda") if on_gpu else pipe


def from_hub(sources: Sequence[str], load: Callable[..., Any]) -> Any:
    """What `load` gets from these repositories, asked to do without the hub if that does not answer at once.

    Raises:
        UnsupportedModelError: one is neither downloaded nor within reach, or it cannot be loaded.
    """
    try:
        return loaded(" with ".join(sources), partial(load, local_files_only=not hub_answers()))
    except OSError as error:
        commands = ", ".join(f"`hf download {source}`" for source in sources)
        raise UnsupportedModelError(
            f"{' with '.join(sources)} is not on this machine and the Hugging Face hub cannot be reached or refuses it; run "
            f"{commands} where it can, or give the folder of a copy"
        ) from error


def from_folder(folder: AnyPath, dtype: torch.dtype) -> Any:
    """The pipeline that was saved there.

    Raises:
        UnsupportedModelError: it is incomplete or broken, or of a class that neither diffusers nor this project has.
    """
    folder = Path(folder)
    load = partial(pipeline_class(folder).from_pretrained, folder, dtype=dtype, local_files_only=True)
    try:
        return loaded(str(folder), load)
    except OSError as error:
        raise UnsupportedModelError(f"the pipeline in {folder} is incomplete or broken: {reason_of(error)}") from error


def loaded(source: str, load: Callable[[], Any]) -> Any:
    """What `load` gets.

    Raises:
        OSError: a file is missing or cannot be read.
        UnsupportedModelError: anything else is wrong with what is loaded.
    """
    try:
        return load()
    except (AttributeError, ImportError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{source} cannot be loaded: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or else its kind."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


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
    """Of the pipeline in a folder; diffusers knows its own classes only.

    Raises:
        UnsupportedModelError: the folder's index names no class, or one that is not known here.
    """
    index = folder / "model_index.json"
    try:
        name = json.loads(index.read_text())["_class_name"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{index} must be a JSON object with a _class_name, as diffusers writes it") from error
    if name == OpenSoraPipeline.__name__:
        return OpenSoraPipeline
    if not isinstance(getattr(diffusers, str(name), None), type):
        raise UnsupportedModelError(f"{index} names {name!r}, a class that diffusers {diffusers.__version__} does not have")
    return DiffusionPipeline


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
