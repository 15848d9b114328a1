"""The model in the box: a small text-to-image PixArt, loaded from `assets/`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline

from blockdance.errors import UnsupportedModelError
from blockdance.profile import Profile

MODEL_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "model"
PROFILE_FILE = MODEL_FOLDER.with_name("profile.json")
MAX_WORDS = 16


class DemoPipeline(PixArtAlphaPipeline):
    """diffusers' `PixArtAlphaPipeline` with call defaults that suit a 64x64 picture and a vocabulary of words.

    `__call__` takes what the parent takes. Only these defaults differ: 30 steps, guidance 4, at most 16 words, and no
    rounding of the size to the aspect ratios of the 1024x1024 model.
    """

    @torch.no_grad()
    def __call__(self, prompt: str | list[str] | None = None, **arguments: Any) -> Any:
        defaults = {
            "num_inference_steps": 30,
            "guidance_scale": 4.0,
            "max_sequence_length": MAX_WORDS,
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        return super().__call__(prompt, **(defaults | arguments))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of `prompt` that the model never saw, in order; it draws as if they were not there."""
        words = self.tokenizer.tokenize(prompt.lower())
        typed = [word for word, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(prompt.lower())]
        return [word for word, token in zip(typed, words, strict=True) if token == self.tokenizer.unk_token]


def load_demo_pipeline(folder: Path | str = MODEL_FOLDER) -> DemoPipeline:
    """Load the model in the box from disk (no network) in float32 on the CPU.

    Raises:
        UnsupportedModelError: the folder holds no pipeline.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").exists():
        raise UnsupportedModelError(
            f"no pipeline in {folder}: model_index.json is missing; see assets/README.md for the recipe"
        )
    pipe = DemoPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_demo_profile() -> Profile:
    """What the planner knows of the model in the box; `python -m analysis profile` measured it."""
    return Profile.load(PROFILE_FILE)
