"""How good a picture is that was drawn with reuse: Q of the reward, larger is better."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from numpy.typing import NDArray

from blockdance.errors import ConfigError

Pixels = NDArray[np.uint8]
Quality = Callable[[str, Pixels, Sequence[Pixels]], list[float]]
"""Of pictures of a prompt, beside the baseline's picture."""
CLIP = "openai/clip-vit-base-patch32"
IMAGE_REWARD = "ImageReward-v1.0"
IMAGE_REWARD_FILES = ("ImageReward.pt", "med_config.json")


def negative_lpips() -> Quality:
    """Minus LPIPS to the baseline's picture: 0 for the same picture. Needs no other model."""
    from analysis.metrics import perceptual_distance

    distance = perceptual_distance()
    return lambda prompt, baseline, pictures: [-distance(baseline, picture) for picture in pictures]


def similarity() -> Quality:
    """SSIM to the baseline's picture, less 1: 0 for the same picture."""
    from analysis.metrics import ssim

    return lambda prompt, baseline, pictures: [ssim(baseline, picture) - 1 for picture in pictures]


def clip_score() -> Quality:
    """Cosine of CLIP's text and picture embeddings, less that of the baseline's picture.

    Raises:
        ConfigError: CLIP's weights are not in the hub's cache.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model: Any = CLIPModel.from_pretrained(CLIP, local_files_only=True).eval()
        processor: Any = CLIPProcessor.from_pretrained(CLIP, local_files_only=True)
    except OSError:
        raise ConfigError(f"quality clip needs the weights of {CLIP} in the hub's cache, which has none") from None

    @torch.no_grad()
    def score(prompt: str, baseline: Pixels, pictures: Sequence[Pixels]) -> list[float]:
        inputs = processor(text=[prompt], images=[baseline, *pictures], return_tensors="pt", padding=True)
        found = model(**inputs)
        cosines = torch.cosine_similarity(found.image_embeds, found.text_embeds).tolist()
        return [cosine - cosines[0] for cosine in cosines[1:]]

    return score


def image_reward() -> Quality:
    """ImageReward (Xu et al. 2023), less that of the baseline's picture.

    Raises:
        ConfigError: the package is not installed, or its weights are not on this machine; nothing is downloaded.
    """
    if importlib.util.find_spec("ImageReward") is None:
        raise ConfigError("quality image-reward needs the package image-reward, which is not installed")
    folder = Path("~/.cache/ImageReward").expanduser()  # its default
    for file in IMAGE_REWARD_FILES:
        if not (folder / file).is_file():
            raise ConfigError(f"quality image-reward needs {file} of THUDM/ImageReward in {folder}, which has none")
    import ImageReward
    from PIL import Image

    try:
        with offline():
            model = ImageReward.load(IMAGE_REWARD)
    except OSError as error:
        raise ConfigError(f"quality image-reward cannot be loaded from this machine alone: {error}") from None

    def score(prompt: str, baseline: Pixels, pictures: Sequence[Pixels]) -> list[float]:
        first, *others = [float(model.score(prompt, Image.fromarray(one))) for one in (baseline, *pictures)]
        return [other - first for other in others]

    return score


@contextmanager
def offline() -> Iterator[None]:
    """Whoever asks the hub meanwhile gets what is on this machine, or an OSError."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


QUALITIES: dict[str, Callable[[], Quality]] = {
    "lpips": negative_lpips,
    "ssim": similarity,
    "clip": clip_score,
    "image-reward": image_reward,
}


@cache
def quality_named(name: str) -> Quality:
    """One of QUALITIES.

    Raises:
        ConfigError: no quality has that name, or it needs weights that are not here.
    """
    if name not in QUALITIES:
        raise ConfigError(f"quality must be one of {', '.join(QUALITIES)}, got {name!r}")
    return QUALITIES[name]()
