"""Runs comparisons for many visitors on one model: one run at a time, cancellable within a step, and remembered."""

import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from analysis.estimates import decode_estimates
from analysis.experiment import (
    Baseline,
    Request,
    another_seed,
    conditioned_on,
    control_figures,
    fewer_steps,
    figures,
    run_baseline,
    run_observed,
    run_variant,
    step_difference,
    warm_up,
    yardsticks,
)
from analysis.features import component_pictures, shown_blocks
from analysis.metrics import PerceptualDistance
from analysis.pictures import Picture
from analysis.timing import Timing, time_interleaved
from blockdance import OnStep, ReuseConfig, Schedule, Trace
from blockdance.ada import AdaPolicy
from blockdance.deciders import schedules_for
from blockdance.demo import WordModel
from blockdance.policy import Decision
from blockdance.scheduled import depth_of
from blockdance.storage import rule_named

ROUNDS = 5
"""Rounds of a proper measurement."""

T = TypeVar("T")


class CancelledError(Exception):
    """The visitor pressed stop or left."""


@dataclass(frozen=True)
class Drawn:
    """A picture with its figures against the baseline (`analysis.experiment.figures`) and the trace of its run."""

    picture: Picture
    figures: dict[str, Any]
    trace: Trace
    step_difference: list[float] | None = None
    """`analysis.experiment.step_difference` of a run with BlockDance."""


@dataclass(frozen=True)
class Observed:
    """What observing the baseline showed, in its conditional branch."""

    cosine: NDArray[np.floating]
    """Similarity map, (num_blocks, num_steps)."""
    features: dict[int, NDArray[np.uint8] | None]
    """By block, the principal components of its output on every step, (num_steps, side, side, 3); None for no square grid."""


@dataclass(frozen=True)
class Decided:
    """What a policy decided on one picture, and what came of it."""

    request: Request
    decision: Decision
    baseline: Picture
    drawn: Drawn


@dataclass(frozen=True)
class View:
    """What is known of a comparison so far; later views of the same comparison know more."""

    request: Request
    schedule: Schedule
    storage: str = "latest"
    """What reuse steps start from: a key of `blockdance.storage.RULES`."""
    note: str | None = None
    """Why nothing is reused, if so."""
    phase: str = "waiting for the model"
    progress: float = 0.0
    """Fraction of the phase, in [0, 1]; 1 in the last view of all, whose phase is `done`."""
    baseline: Baseline | None = None
    variant: Drawn | None = None
    """With BlockDance."""
    observed: Observed | None = None
    """Where the baseline's features repeat."""
    control: Drawn | None = None
    """The plain sampler with fewer steps at about the same cost."""
    baseline_previews: list[Picture] | None = None
    variant_previews: list[Picture] | None = None
    """The picture that each step expects; None for large pictures."""
    yardsticks: dict[str, Any] | None = None
    """The scale of a difference: `analysis.experiment.yardsticks`."""
    timing: Timing | None = None
    """Of interleaved rounds, where that was asked for."""
    decided: tuple[Decided, ...] = ()
    """Of a policy, where that was asked for."""


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
        self._previews, self._yardsticks, self._decided = Memory(2 * capacity), Memory(capacity), Memory(8 * capacity)
        with self._model:
            warm_up(pipe, first_prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model never saw, if it can tell."""
        return self.pipe.unknown_words(prompt) if isinstance(self.pipe, WordModel) else []

    def styles(self) -> list[str]:
        """What a prompt may ask for by a word; none with a model of one style."""
        return list(self.pipe.styles) if isinstance(self.pipe, WordModel) else []

    def nearest_words(self, words: list[str]) -> dict[str, list[str]]:
        """For each of these words the known ones that are spelled like it."""
        return {word: self.pipe.nearest_words(word) for word in words}

    def known_words(self) -> list[str] | None:
        """The words or classes the model knows, in order; None if it takes any text."""
        if isinstance(self.pipe, WordModel):
            return self.pipe.known_words()
        return sorted(self.pipe.labels) if hasattr(self.pipe, "get_label_ids") else None

    def views(self, request: Request, config: ReuseConfig | Schedule, storage: str = "latest") -> Iterator[View]:
        """Compute a comparison on a worker thread and yield what is known so far, whenever more is.

        Closing the iterator cancels the run within one step.

        Raises:
            BlockDanceError: the config or schedule does not fit the model or the request, or the model the prompt; before
                anything runs.
        """
        yield from self._news_of(self._job(request, config, storage), self._compare)

    def measured(
        self, request: Request, config: ReuseConfig | Schedule, storage: str = "latest", rounds: int = ROUNDS
    ) -> Iterator[View]:
        """Like `views`, but times the baseline and BlockDance in interleaved rounds of full runs and draws nothing.

        Raises:
            BlockDanceError: as `views`.
        """

        def measure(job: Job) -> None:
            with self._model:
                steps = itertools.count(1)
                in_all = 2 * rounds * request.steps

                def check() -> None:
                    job.check()
                    job.learn(phase=f"timing {rounds} rounds", progress=min(1.0, next(steps) / in_all))

                schedule = job.view.schedule
                timings = time_interleaved(self.pipe, request, [schedule], rounds, check, storage)
                job.learn(timing=timings[schedule])
            job.learn(phase="done", progress=1.0)

        yield from self._news_of(self._job(request, config, storage), measure)

    def decided(self, requests: Sequence[Request], policy: AdaPolicy) -> Iterator[View]:
        """Let a policy decide on each of these pictures, and draw them with what it decided.

        Raises:
            BlockDanceError: the policy was trained for another model, or a prompt does not fit this one.
        """
        policy.check(self.pipe.transformer)

        def decide(job: Job) -> None:
            for request in requests:
                baseline = self._baseline(job, request, f"plain sampler, {request.prompt}")
                found = self._decided.recall((request, policy.saving), partial(self._decide, job, baseline, policy))
                drawn, decision = found[0], found[1]
                fresh = Decided(request, decision, baseline.picture, drawn)
                job.learn(decided=(*job.view.decided, fresh))
            job.learn(phase="done", progress=1.0)

        *_, first = [self._job(request, ReuseConfig(1), policy.config.storage_name) for request in reversed(requests)]
        yield from self._news_of(first, decide)

    def _decide(self, job: Job, baseline: Baseline, policy: AdaPolicy) -> tuple[Drawn, Decision]:
        """One run with a policy; the picture is remembered like that of a visitor who asks for the same schedule."""
        storage = policy.config.storage_name
        drawn, estimates = self._variant(job, baseline, policy, storage)
        schedule = drawn.trace.schedule
        self._variants.recall((baseline.request, schedule, storage), lambda: (drawn, estimates))
        dense = Decision(Schedule.dense(baseline.request.steps), ())
        return drawn, drawn.trace.decisions[0] if drawn.trace.decisions else dense

    def _job(self, request: Request, config: ReuseConfig | Schedule, storage: str) -> Job:
        rule_named(storage)
        conditioned_on(self.pipe, request.prompt)
        note = config.why_dense(request.steps) if isinstance(config, ReuseConfig) else None
        return Job(View(request, schedules_for(config, request.steps, self.num_blocks)[0], storage, note))

    def _news_of(self, job: Job, work: Callable[[Job], None]) -> Iterator[View]:
        """Do a job on a worker thread and yield its views; closing the iterator cancels it within a step."""
        worker = threading.Thread(target=self._work, args=(job, work), daemon=True)
        worker.start()
        try:
            yield from job.news()
        finally:
            job.cancelled.set()
            worker.join()

    def _work(self, job: Job, work: Callable[[Job], None]) -> None:
        """Do the work, and tell the one who waits how it ended."""
        try:
            work(job)
            job.updates.put(None)
        except CancelledError:
            job.updates.put(None)
        except BaseException as error:
            job.updates.put(error)

    def _compare(self, job: Job) -> None:
        """Pictures first, then the map, the control with fewer steps, the steps of both, and the scale of a difference."""
        request, setting = job.view.request, (job.view.request, job.view.schedule, job.view.storage)
        baseline = self._baseline(job, request, "plain sampler")
        variant, estimates = self._variants.recall(setting, lambda: self._variant(job, baseline, *setting[1:]))
        job.learn(baseline=baseline, variant=variant)
        job.learn(observed=self._maps.recall(request, lambda: self._observed(job, request)))
        plain = self._baseline(job, fewer_steps(request, variant.trace.speedup_ideal), "fewer steps")
        job.learn(control=Drawn(plain.picture, control_figures(baseline, plain, self.distance), plain.recording.trace))
        job.learn(
            baseline_previews=self._steps_of(job, request, baseline.estimates),
            variant_previews=self._steps_of(job, setting, estimates),
        )
        another = self._baseline(job, another_seed(request), "another seed")
        scale = self._yardsticks.recall(request, lambda: yardsticks(baseline, another, self.distance))
        job.learn(yardsticks=scale, phase="done", progress=1.0)

    def _baseline(self, job: Job, request: Request, phase: str) -> Baseline:
        def run() -> Baseline:
            with self._model:
                job.check()
                return run_baseline(self.pipe, request, job.on_step(phase))

        return self._baselines.recall(request, run)

    def _variant(
        self, job: Job, baseline: Baseline, schedule: Schedule | AdaPolicy, storage: str
    ) -> tuple[Drawn, list[Tensor]]:
        with self._model:
            job.check()
            tell = job.on_step("BlockDance")
            variant = run_variant(self.pipe, baseline.request, schedule, baseline.recording, tell, storage)
        drawn = figures(baseline, variant, self.distance)
        return Drawn(variant.picture, drawn, variant.trace, step_difference(baseline, variant)), variant.estimates

    def _observed(self, job: Job, request: Request) -> Observed:
        with self._model:
            job.check()
            observation = run_observed(self.pipe, request, job.on_step("similarity map"))
        features = {block: component_pictures(observation.features(block)[:, 0]) for block in shown_blocks(self.num_blocks)}
        return Observed(observation.cosine()[:, :, 0].numpy(), features)

    def _steps_of(self, job: Job, key: Hashable, estimates: list[Tensor]) -> list[Picture] | None:
        def draw() -> list[Picture] | None:
            with self._model:
                job.check()
                return decode_estimates(self.pipe, estimates)

        return self._previews.recall(key, draw)
