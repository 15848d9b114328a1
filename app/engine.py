"""Runs comparisons for many visitors on one model: one run at a time, cancellable within a step, and remembered."""

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
    conditioned_on,
    control_figures,
    fewer_steps,
    figures,
    plan,
    run_baseline,
    run_observed,
    run_variant,
    warm_up,
)
from analysis.metrics import PerceptualDistance
from analysis.pictures import Picture
from blockdance import OnStep, ReuseConfig, Schedule, Trace
from blockdance.scheduled import depth_of

T = TypeVar("T")


class CancelledError(Exception):
    """The visitor pressed stop or left."""


@dataclass(frozen=True)
class Drawn:
    """A picture with its figures against the baseline (`analysis.experiment.figures`) and the trace of its run."""

    picture: Picture
    figures: dict[str, Any]
    trace: Trace


@dataclass(frozen=True)
class View:
    """What is known of a comparison so far; later views of the same comparison know more."""

    request: Request
    schedule: Schedule
    note: str | None = None
    """Why nothing is reused, if so."""
    phase: str = "waiting for the model"
    progress: float = 0.0
    """Fraction of the phase, in [0, 1]; 1 in the last view of all, whose phase is `done`."""
    baseline: Picture | None = None
    variant: Drawn | None = None
    """With BlockDance."""
    cosine: NDArray[np.floating] | None = None
    """Similarity map of the baseline's conditional branch, (num_blocks, num_steps)."""
    control: Drawn | None = None
    """The plain sampler with fewer steps at about the same cost."""


class Memory:
    """The most recent results of pure functions of their keys; safe to share between visitors."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        """The remembered result, or a new one; then the one unused for longest is forgotten if there are too many."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        made = make()
        with self._lock:
            self._items[key] = made
            while len(self._items) > self.capacity:
                self._items.popitem(last=False)
        return made


class Job:
    """One comparison on its way: what is known of it, who is told, and whether it shall stop."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.cancelled = threading.Event()
        self.updates: queue.Queue[View | BaseException | None] = queue.Queue()

    def learn(self, **facts: Any) -> None:
        """Add facts to the view and tell."""
        self.view = replace(self.view, **facts)
        self.updates.put(self.view)

    def check(self) -> None:
        """Raise CancelledError if the job shall stop."""
        if self.cancelled.is_set():
            raise CancelledError

    def on_step(self, phase: str) -> OnStep:
        """A callback that tells about every step of a run and cancels it when the job shall stop."""

        def tell(step: int, num_steps: int) -> None:
            self.check()
            self.learn(phase=phase, progress=(step + 1) / num_steps)

        return tell

    def news(self) -> Iterator[View]:
        """The newest view whenever there is one, until the job ends; raises what the job raised."""
        while True:
            batch = [self.updates.get()]
            while not self.updates.empty():
                batch.append(self.updates.get())
            views = [update for update in batch if isinstance(update, View)]
            if views:
                yield views[-1]
            if isinstance(batch[-1], BaseException):
                raise batch[-1]
            if batch[-1] is None:
                return


class Engine:
    """The model and what it has computed so far.

    Args:
        pipe: the pipeline; only copies with a scheduler of their own are run.
        distance: the perceptual distance of the figures.
        first_prompt: something the model can draw, to warm up with.
        capacity: how many requests are remembered; of each a few megabytes.
        lock: held during every run; engines that share one run one at a time.
    """

    def __init__(
        self,
        pipe: Any,
        distance: PerceptualDistance,
        first_prompt: str = "red apple",
        capacity: int = 64,
        lock: "threading.Lock | None" = None,
    ) -> None:
        self.pipe = pipe
        self.distance = distance
        self.first_prompt = first_prompt
        self.num_blocks = depth_of(pipe)
        self._model = lock or threading.Lock()
        self._baselines, self._maps, self._variants = Memory(capacity), Memory(capacity), Memory(8 * capacity)
        with self._model:
            warm_up(pipe, first_prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model never saw, if it can tell."""
        words: list[str] = self.pipe.unknown_words(prompt) if hasattr(self.pipe, "unknown_words") else []
        return words

    def known_words(self) -> list[str] | None:
        """The words or classes the model knows, in order; None if it takes any text."""
        if hasattr(self.pipe, "unknown_words"):
            return sorted(word for word in self.pipe.tokenizer.get_vocab() if word.isalpha())
        return sorted(self.pipe.labels) if hasattr(self.pipe, "get_label_ids") else None

    def views(self, request: Request, config: ReuseConfig) -> Iterator[View]:
        """Compute a comparison on a worker thread and yield what is known so far, whenever more is.

        Closing the iterator cancels the run within one step.

        Raises:
            BlockDanceError: the config does not fit the model, or the prompt; before anything runs.
        """
        conditioned_on(self.pipe, request.prompt)
        job = Job(View(request, plan(config, request, self.num_blocks), config.why_dense(request.steps)))
        worker = threading.Thread(target=self._work, args=(job,), daemon=True)
        worker.start()
        try:
            yield from job.news()
        finally:
            job.cancelled.set()
            worker.join()

    def _work(self, job: Job) -> None:
        """Compare, and tell the one who waits how it ended."""
        try:
            self._compare(job)
            job.updates.put(None)
        except CancelledError:
            job.updates.put(None)
        except BaseException as error:
            job.updates.put(error)

    def _compare(self, job: Job) -> None:
        """Pictures first, then the map, then the control with fewer steps."""
        request, schedule = job.view.request, job.view.schedule
        baseline = self._baseline(job, request, "plain sampler")
        variant = self._variants.recall((request, schedule), lambda: self._variant(job, baseline, schedule))
        job.learn(baseline=baseline.picture, variant=variant)
        job.learn(cosine=self._maps.recall(request, lambda: self._map(job, request)))
        plain = self._baseline(job, fewer_steps(request, variant.trace.speedup_ideal), "fewer steps")
        control = Drawn(plain.picture, control_figures(baseline, plain, self.distance), plain.recording.trace)
        job.learn(control=control, phase="done", progress=1.0)

    def _baseline(self, job: Job, request: Request, phase: str) -> Baseline:
        def run() -> Baseline:
            with self._model:
                job.check()
                return run_baseline(self.pipe, request, job.on_step(phase))

        return self._baselines.recall(request, run)

    def _variant(self, job: Job, baseline: Baseline, schedule: Schedule) -> Drawn:
        with self._model:
            job.check()
            variant = run_variant(self.pipe, baseline.request, schedule, baseline.recording, job.on_step("BlockDance"))
            return Drawn(variant.picture, figures(baseline, variant, self.distance), variant.trace)

    def _map(self, job: Job, request: Request) -> NDArray[np.floating]:
        with self._model:
            job.check()
            return run_observed(self.pipe, request, job.on_step("similarity map")).cosine()[:, :, 0].numpy()
