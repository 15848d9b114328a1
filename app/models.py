"""The models visitors can choose: each with an engine of its own, and only a few in memory at a time."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from analysis.experiment import Request, default_sampler
from analysis.metrics import PerceptualDistance
from app.engine import Engine
from blockdance import ReuseConfig, UnsupportedModelError
from blockdance.presets import DEMO, DEMO_STYLES, PRESETS, load_pipeline
from blockdance.schedule import default_cutoff

KEPT = 1
"""Models kept beside the one the app started with and the one in the box; while another is loaded to take the place of the
one unused for longest, there is one more."""
CLASS_PROMPT = "golden retriever"
TEXT_PROMPT = "red apple"
EXAMPLES = {DEMO_STYLES: ["guitar", "bicycle", "crown", "green car", "blue house", "green dog face"]}


@dataclass(frozen=True)
class Settings:
    """What the controls show when a model is chosen."""

    request: Request
    config: ReuseConfig
    num_blocks: int
    known_words: list[str] | None
    """The words or classes the model knows; None if it takes any text."""
    styles: list[str]
    """What a prompt may ask for by a word."""
    examples: list[str]
    """Prompts to begin with, beside those that ship."""


class Models:
    """Engines by the name of their model (see `blockdance.presets.load_pipeline`), loaded when first asked for.

    Args:
        distance: the perceptual distance of all figures.
        first: the model the app starts with, which stays in memory.

    Raises:
        UnsupportedModelError: the first model cannot be loaded.
    """

    def __init__(self, distance: PerceptualDistance, first: str = DEMO) -> None:
        self.distance = distance
        self.first = first
        self._running, self._loading, self._shelf = threading.Lock(), threading.Lock(), threading.Lock()
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self.engine(first)

    @property
    def names(self) -> list[str]:
        """To choose from: the first one, the picture models in the box, and those of the presets that draw pictures."""
        return list(
            dict.fromkeys([self.first, DEMO, DEMO_STYLES, *(name for name, preset in PRESETS.items() if not preset.checkpoint)])
        )

    def loaded(self, name: str) -> Engine | None:
        """The engine of a model that is in memory."""
        with self._shelf:
            if name in self._engines:
                self._engines.move_to_end(name)
            return self._engines.get(name)

    def engine(self, name: str) -> Engine:
        """The engine of a model; loading it may take minutes, in which those in memory stay at hand.

        Raises:
            UnsupportedModelError: not one of `names`, or it cannot be loaded; those in memory stay.
        """
        if name not in self.names:
            raise UnsupportedModelError(f"model must be one of {', '.join(self.names)}, got {name!r}")
        engine = self.loaded(name)
        if engine is None:
            with self._loading:  # whoever waited here finds it loaded
                engine = self.loaded(name) or self._load(name)
        return engine

    def _load(self, name: str) -> Engine:
        pipe = load_pipeline(name)
        engine = Engine(pipe, self.distance, first_prompt(pipe), lock=self._running)
        with self._shelf:
            self._engines[name] = engine
            others = [name for name in self._engines if name not in (self.first, DEMO)]
            for other in others[:-KEPT]:
                del self._engines[other]
        return engine

    def settings(self, name: str) -> Settings:
        """The paper's for one of its models, else the usual ones; loads the model.

        Raises:
            UnsupportedModelError: the model cannot be loaded.
        """
        engine, preset = self.engine(name), PRESETS.get(name)
        told = engine.num_blocks, engine.known_words(), engine.styles(), EXAMPLES.get(name, [])
        if preset is None:
            config = ReuseConfig(cutoff_block=default_cutoff(engine.num_blocks))
            request = Request(engine.first_prompt, sampler=default_sampler(engine.pipe))
            return Settings(request, config, *told)
        request = Request(engine.first_prompt, 0, preset.steps, preset.guidance, preset.sampler)
        return Settings(request, preset.config, *told)


def first_prompt(pipe: Any) -> str:
    """Something the model can draw: a class where it knows only classes."""
    labels = getattr(pipe, "labels", None)
    if not labels:
        styles = getattr(pipe, "styles", ())
        return pipe.in_style(TEXT_PROMPT, styles[0]) if styles else TEXT_PROMPT
    return CLASS_PROMPT if CLASS_PROMPT in labels else next(iter(labels))
