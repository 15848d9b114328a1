"""Runs comparisons for many visitors on one model: one at a time, cancellable, and remembered."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.experiment import (
    Baseline,
    Request,
    Variant,
    figures,
    plan,
    run_baseline,
    run_observed,
    run_variant,
    warm_up,
)
from analysis.metrics import PerceptualDistance
from blockdance import OnStep, ReuseConfig, Schedule

T = TypeVar("T")


class CancelledError(Exception):
    """The visitor pressed stop or left."""


@dataclass(frozen=True)
class View:
    """What is known of a comparison so far; later views of one run know more."""

    request: Request
    schedule: Schedule
    status: str = ""
    note: str | None = None
    baseline: Baseline | None = None
    variant: Variant | None = None
    figures: dict[str, Any] | None = None
    fewer: dict[str, Any] | None = None
    """The same figures for the plain sampler with fewer steps, at about the same cost."""
    fewer_picture: NDArray[np.uint8] | None = None
    cosine: NDArray[np.floating] | None = None
    """Similarity map of the baseline's conditional branch, (num_blocks, num_steps)."""


class Memory:
    """The most recent results of pure functions of their keys; safe to share between visitors."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """The remembered result, or None."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        """Remember a result and forget the one unused for longest."""
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self.capacity:
                self._items.popitem(last=False)

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        """The remembered result, or a new one."""
        known = self.get(key)
        if known is None:
            known = make()
            self.put(key, known)
        return known


class Engine:
    """The model, its lock and what it has computed so far."""

    def __init__(self, pipe: Any, distance: PerceptualDistance) -> None:
        self.pipe = pipe
        self.distance = distance
        self.num_blocks = len(pipe.transformer.transformer_blocks)
        self._model = threading.Lock()
        self._baselines, self._maps, self._variants = Memory(64), Memory(64), Memory(512)
        warm_up(pipe)

    def schedule(self, request: Request, config: ReuseConfig) -> Schedule:
        """What a setting means for a request; raises BlockDanceError for one that cannot be."""
        return plan(config, request, self.num_blocks)

    def views(self, request: Request, config: ReuseConfig) -> Iterator[View]:
        """Compute a comparison on a worker thread and yield what is known after every step.

        Closing the iterator cancels the run within one step.
        """
        updates: queue.Queue[View | BaseException | None] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self._compare(request, config, updates.put, cancelled)
                updates.put(None)
            except CancelledError:
                updates.put(None)
            except BaseException as error:
                updates.put(error)

        schedule = self.schedule(request, config)
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield View(request, schedule, "waiting for the model")
            while (update := updates.get()) is not None:
                if isinstance(update, BaseException):
                    raise update
                yield update
        finally:
            cancelled.set()
            worker.join()

    def compare(self, request: Request, config: ReuseConfig) -> View:
        """Compute a comparison without its map, here and now."""
        last = View(request, self.schedule(request, config))

        def keep(view: View) -> None:
            nonlocal last
            last = view

        self._compare(request, config, keep, threading.Event(), with_map=False)
        return last

    def _compare(
        self,
        request: Request,
        config: ReuseConfig,
        tell: Callable[[View], None],
        cancelled: threading.Event,
        with_map: bool = True,
    ) -> None:
        """The pictures first, then the control with fewer steps, then the map."""
        view = View(request, self.schedule(request, config), note=config.why_dense(request.steps))

        def telling(what: str) -> OnStep:
            def on_step(step: int, num_steps: int) -> None:
                if cancelled.is_set():
                    raise CancelledError
                tell(replace(view, status=f"{what}: step {step + 1} of {num_steps}"))

            return on_step

        def with_model(run: Callable[[], T]) -> Callable[[], T]:
            def locked() -> T:
                with self._model:
                    if cancelled.is_set():
                        raise CancelledError
                    return run()

            return locked

        baseline = self._baselines.recall(
            request, with_model(lambda: run_baseline(self.pipe, request, telling("plain sampler")))
        )
        view = replace(view, baseline=baseline, cosine=self._maps.get(request))
        tell(view)
        variant, found = self._variants.recall(
            (request, view.schedule), with_model(lambda: self._variant(baseline, view.schedule, telling("BlockDance")))
        )
        view = replace(view, variant=variant, figures=found)
        tell(view)
        fewer_picture, fewer = self._fewer(baseline, found["speedup_ideal"], with_model, telling("fewer steps"))
        view = replace(view, fewer=fewer, fewer_picture=fewer_picture)
        tell(view)
        if with_map:
            observed = with_model(lambda: run_observed(self.pipe, request, telling("similarity map")))
            cosine = self._maps.recall(request, lambda: observed().cosine()[:, :, 0].numpy())
            tell(replace(view, cosine=cosine))

    def _variant(self, baseline: Baseline, schedule: Schedule, on_step: OnStep) -> tuple[Variant, dict[str, Any]]:
        variant = run_variant(self.pipe, baseline.request, schedule, baseline.recording, on_step)
        return variant, figures(baseline, variant, self.distance)

    def _fewer(
        self, baseline: Baseline, speedup: float, with_model: Callable[..., Callable[[], Any]], on_step: OnStep
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """The plain sampler with the number of steps that costs what the schedule costs."""
        request = replace(baseline.request, steps=max(1, round(baseline.request.steps / speedup)))
        plain = self._baselines.recall(request, with_model(lambda: run_baseline(self.pipe, request, on_step)))
        same_as_variant = Variant(
            Schedule.dense(request.steps), plain.picture, plain.recording.trace, plain.outside_seconds
        )
        found = figures(baseline, same_as_variant, self.distance)
        ideal = baseline.request.steps / request.steps
        return plain.picture, found | {"steps": request.steps, "speedup_ideal": ideal}
