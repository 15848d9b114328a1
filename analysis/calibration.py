"""What some rivals must know of a model before they start: measured once, on a prompt that is not compared."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from analysis.experiment import Request

PROMPT = "rainbow"
SEED = 1000

Found = TypeVar("Found")


class Calibration(Generic[Found]):
    """A measurement of a model for a request's sampler, steps and guidance, remembered as long as the model lives."""

    def __init__(self, measure: Callable[[Any, Request], Found]) -> None:
        self._measure = measure
        self._known: WeakKeyDictionary[Any, dict[Request, Found]] = WeakKeyDictionary()

    def __call__(self, pipe: Any, request: Request) -> Found:
        known = self._known.setdefault(pipe.transformer, {})
        labels = getattr(pipe, "labels", None)
        key = replace(request, prompt=next(iter(labels)) if labels else PROMPT, seed=SEED)
        if key not in known:
            known[key] = self._measure(pipe, key)
        return known[key]
