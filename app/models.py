"""The models visitors can choose: each with an engine of its own, and only a few in memory at a time."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from analysis.experiment import Request
from analysis.metrics import PerceptualDistance
from app.engine import Engine
from blockdance import ReuseConfig
from blockdance.presets import DEMO, PRESETS, load_pipeline
from blockdance.schedule import default_cutoff

KEPT = 1
"""Models kept beside the one the app started with; another one takes the place of the one unused for longest."""
CLASS_PROMPT = "golden retriever"
TEXT_PROMPT = "red apple"


@dataclass(frozen=True)
class Settings:
    """What the controls show when a model is chosen."""

    request: Request
    config: ReuseConfig
    num_blocks: int


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
        self._running, self._loading = threading.Lock(), threading.Lock()
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self.engine(first)

    @property
    def names(self) -> list[str]:
        """To choose from: the first one, the model in the box, and those of the presets that draw pictures."""
        return list(dict.fromkeys([self.first, DEMO, *(name for name, preset in PRESETS.items() if not preset.checkpoint)]))

    def has(self, name: str) -> bool:
        """Whether the model is in memory."""
        return name in self._engines

    def engine(self, name: str) -> Engine:
        """The engine of a model; loading it may take minutes.

        Raises:
            UnsupportedModelError: the model cannot be loaded; those in memory stay.
        """
        with self._loading:
            if name not in self._engines:
                pipe = load_pipeline(name)
                with self._running:  # nobody's seconds are measured while a new model warms up
                    engine = Engine(pipe, self.distance, first_prompt(pipe), lock=self._running)
                self._engines[name] = engine
                self._forget_others()
            self._engines.move_to_end(name)
            return self._engines[name]

    def settings(self, name: str) -> Settings:
        """The paper's for one of its models, else the usual ones; loads the model.

        Raises:
            UnsupportedModelError: the model cannot be loaded.
        """
        engine, preset = self.engine(name), PRESETS.get(name)
        if preset is None:
            config = ReuseConfig(cutoff_block=default_cutoff(engine.num_blocks))
            return Settings(Request(engine.first_prompt), config, engine.num_blocks)
        request = Request(engine.first_prompt, 0, preset.steps, preset.guidance, preset.sampler)
        return Settings(request, preset.config, engine.num_blocks)

    def _forget_others(self) -> None:
        others = [name for name in self._engines if name != self.first]
        for name in others[:-KEPT]:
            del self._engines[name]


def first_prompt(pipe: Any) -> str:
    """Something the model can draw: a class where it knows only classes."""
    labels = getattr(pipe, "labels", None)
    if not labels:
        return TEXT_PROMPT
    return CLASS_PROMPT if CLASS_PROMPT in labels else next(iter(labels))
