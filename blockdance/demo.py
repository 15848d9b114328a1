"""The models in the box: two small text-to-image PixArts and a small text-to-video STDiT, loaded from `assets/`."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from transformers import PreTrainedTokenizerFast

from blockdance.errors import ConfigError, UnsupportedModelError
from blockdance.models.opensora import OpenSoraPipeline
from blockdance.paths import AnyPath
from blockdance.profile import Profile

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "model"
STYLES_FOLDER = MODEL_FOLDER.with_name("styles")
VIDEO_FOLDER = MODEL_FOLDER.with_name("video")
PROFILE_FILE = MODEL_FOLDER.with_name("profile.json")
STYLES = ("fluent", "noto", "twemoji")
"""Words that say how to draw and not what; `load_demo_styles_pipeline` knows them."""
MAX_WORDS = 16
STEPS = 30
GUIDANCE = 4.0


class WordModel:
    """A pipeline whose tokenizer knows whole words, and no others."""

    tokenizer: PreTrainedTokenizerFast

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of `prompt` that the model never saw, in order; it draws as if they were not there."""
        words = self.tokenizer.tokenize(prompt.lower())
        typed = [word for word, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(prompt.lower())]
        return [word for word, token in zip(typed, words, strict=True) if token == self.tokenizer.unk_token]

    def known_words(self) -> list[str]:
        """Every word that the model was trained with, in alphabetical order."""
        return sorted(word for word in self.tokenizer.get_vocab() if word.isalpha())

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles to choose from; none where the model draws in one alone."""
        vocabulary = self.tokenizer.get_vocab()
        return tuple(style for style in STYLES if style in vocabulary)

    def in_style(self, prompt: str, style: str) -> str:
        """The prompt as the model was trained to hear that style: the style's word first, in place of any other.

        Raises:
            ConfigError: not one of `styles`.
        """
        if style not in self.styles:
            known = f"one of {', '.join(self.styles)}" if self.styles else "left out with a model of one style"
            raise ConfigError(f"style must be {known}, got {style!r}")
        return " ".join([style, *(word for word in prompt.split() if word.lower() not in self.styles)])

    def nearest_words(self, word: str, count: int = 3) -> list[str]:
        """The known words spelled most like `word`, the likest first."""
        return get_close_matches(word.lower(), self.known_words(), count, cutoff=0.5)


class DemoPipeline(WordModel, PixArtAlphaPipeline):
    """diffusers' `PixArtAlphaPipeline` with call defaults that suit a 64x64 picture and a vocabulary of words.

    `__call__` takes what the parent takes, and `style`, one of `styles` (see `in_style`). Only these defaults differ: 30
    steps, guidance 4, at most 16 words, and no rounding of the size to the aspect ratios of the 1024x1024 model.
    """

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, style: str | None = None, **arguments: Any) -> Any:
        if style is not None:
            if prompt is None:
                raise ConfigError(f"style must go with a prompt, got {style!r} and no prompt")
            prompt = self.in_style(prompt, style) if isinstance(prompt, str) else [self.in_style(one, style) for one in prompt]
        defaults = {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": MAX_WORDS,
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        return super().__call__(prompt, **(defaults | arguments))


class DemoVideoPipeline(WordModel, OpenSoraPipeline):
    """Open-Sora 1.0's pipeline with call defaults that suit the small model: 30 steps, guidance 4."""

    def __call__(self, prompt: str | list[str], **arguments: Any) -> Any:  # type: ignore[override]  # only defaults differ
        return super().__call__(prompt, **({"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | arguments))


def load_demo_pipeline(folder: AnyPath = MODEL_FOLDER) -> DemoPipeline:
    """Load the picture model in the box from disk (no network) in float32 on the CPU.

    Raises:
        UnsupportedModelError: the folder holds no pipeline.
    """
    pipe: DemoPipeline = loaded(DemoPipeline, Path(folder))
    return pipe


def load_demo_styles_pipeline(folder: AnyPath = STYLES_FOLDER) -> DemoPipeline:
    """Load the picture model in the box that draws in three styles, from disk (no network) in float32 on the CPU.

    Raises:
        UnsupportedModelError: the folder holds no pipeline.
    """
    return load_demo_pipeline(folder)


def load_demo_video_pipeline(folder: AnyPath = VIDEO_FOLDER) -> DemoVideoPipeline:
    """Load the video model in the box from disk (no network) in float32 on the CPU.

    Raises:
        UnsupportedModelError: the folder holds no pipeline.
    """
    pipe: DemoVideoPipeline = loaded(DemoVideoPipeline, Path(folder))
    return pipe


def loaded(kind: Any, folder: Path) -> Any:
    """A pipeline of that class from its folder."""
    if not (folder / "model_index.json").exists():
        raise UnsupportedModelError(
            f"no pipeline in {folder}: model_index.json is missing; see assets/README.md for the recipe"
        )
    pipe = kind.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_demo_profile() -> Profile:
    """What the planner knows of the model in the box; `python -m analysis profile` measured it."""
    return Profile.load(PROFILE_FILE)
