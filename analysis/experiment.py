"""One comparison: the baseline and BlockDance from the same noise, and every figure that comes of it."""

import copy
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor
from torch.linalg import vector_norm

from analysis.estimates import estimates_of
from analysis.features import shown_blocks
from analysis.metrics import PerceptualDistance, difference
from analysis.pictures import Picture, Video, as_jpeg, drawn
from blockdance import (
    MIN_STEPS,
    BlockDanceError,
    Observation,
    OnStep,
    Recording,
    ReuseConfig,
    Schedule,
    Trace,
    accelerate,
    observe,
    record,
)
from blockdance.ada import AdaPolicy
from blockdance.scheduled import depth_of
from blockdance.storage import rule_named

OWN = "own"
SAMPLERS: dict[str, Any] = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "Heun": HeunDiscreteScheduler,
    OWN: None,
}
"""The samplers a request can name, each driven by the model's own noise schedule; `own` is the pipeline's own scheduler."""
PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a model may predict for the named samplers to fit it."""
MAX_STEPS = 100
MAX_SEED = 2**32 - 1


class RequestError(BlockDanceError):
    """A request has a value outside its range."""


class SamplerError(RequestError):
    """A request names a sampler that the pipeline's model was not trained for."""


@dataclass(frozen=True)
class Request:
    """All that a baseline picture depends on.

    Raises:
        RequestError: a value outside its range.
    """

    prompt: str
    seed: int = 0
    """In [0, 2**32 - 1]."""
    steps: int = 30
    """Sampling steps, in [1, 100]."""
    guidance: float = 4.0
    """Classifier-free guidance scale in [1, 20]; 1 samples without guidance."""
    sampler: str = "DDIM"
    """A key of SAMPLERS."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError(f"prompt must be a text that is not empty, got {self.prompt!r}")
        check_range("seed", self.seed, 0, MAX_SEED, int)
        check_range("steps", self.steps, 1, MAX_STEPS, int)
        check_range("guidance", self.guidance, 1, 20, (int, float))
        if self.sampler not in SAMPLERS:
            raise RequestError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")


@dataclass(frozen=True)
class Baseline:
    """The plain run of a request."""

    request: Request
    picture: Picture | Video
    recording: Recording
    outside_seconds: float
    """Seconds of the call outside the sampling loop: text encoder and decoder."""
    estimates: list[Tensor] = field(default_factory=list)
    """The clean latent that the sampler expected at every step; empty where the scheduler does not tell."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole call."""
        return self.recording.trace.seconds + self.outside_seconds


@dataclass(frozen=True)
class Variant:
    """The run of a request with a schedule, given or decided in the run."""

    schedule: Schedule
    picture: Picture | Video
    trace: Trace
    outside_seconds: float
    estimates: list[Tensor] = field(default_factory=list)
    """The clean latent that the sampler expected at every step; empty where the scheduler does not tell."""
    storage: str = "latest"
    """What reuse steps started from: a key of `blockdance.storage.RULES`."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole call; replayed steps count with the seconds they took when recorded."""
        return self.trace.seconds + self.outside_seconds


def check_range(name: str, value: Any, low: float, high: float, kinds: type | tuple[type, ...]) -> None:
    """Raise RequestError unless `value` is of one of the kinds of number and low <= value <= high."""
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        number = "an integer" if kinds is int else "a number"
        raise RequestError(f"{name} must be {number} in [{low}, {high}], got {value!r}")


def default_sampler(pipe: Any) -> str:
    """DDIM, or `own` for a model that only its own scheduler fits: one of flow matching, or without a schedule of betas."""
    config = getattr(pipe.scheduler, "config", {})
    flows = type(pipe.scheduler).__name__.startswith("FlowMatch")
    fits = not flows and "beta_schedule" in config and config.get("prediction_type") in PREDICTIONS
    return Request.sampler if fits else OWN


def check_sampler(pipe: Any, sampler: str) -> None:
    """Raise SamplerError unless the pipeline's model can be driven by that sampler."""
    if sampler != OWN and default_sampler(pipe) == OWN:
        raise SamplerError(
            f"sampler must be {OWN} for {type(pipe).__name__}, as its model fits no scheduler but "
            f"{type(pipe.scheduler).__name__} and its like, got {sampler!r}"
        )


def with_sampler(pipe: Any, sampler: str) -> Any:
    """The same networks in a pipeline with a scheduler of its own, so that nothing of a run is shared.

    Raises:
        SamplerError: the pipeline's model was not trained for that sampler.
    """
    check_sampler(pipe, sampler)
    own = sampler == OWN
    scheduler = copy.deepcopy(pipe.scheduler) if own else SAMPLERS[sampler].from_config(pipe.scheduler.config)
    view = copy.copy(pipe)
    view._internal_dict = dict(pipe._internal_dict)
    view.register_modules(scheduler=scheduler)
    view.set_progress_bar_config(disable=True)
    return view


def sample(pipe: Any, request: Request) -> Picture | Video:
    """One picture or video of a pipeline with the request's sampler already in place."""
    output = pipe(
        **conditioned_on(pipe, request.prompt),
        num_inference_steps=request.steps,
        guidance_scale=float(request.guidance),
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    )
    return drawn(output)


def conditioned_on(pipe: Any, prompt: str) -> dict[str, Any]:
    """The call's arguments for a prompt: the text itself, or for DiT the ImageNet class of that name.

    Raises:
        RequestError: no class has that name; the nearest ones are named.
    """
    if not hasattr(pipe, "get_label_ids"):
        return {"prompt": prompt}
    if prompt not in pipe.labels:
        near = ", ".join(repr(name) for name in get_close_matches(prompt, pipe.labels, n=3, cutoff=0))
        raise RequestError(
            f"prompt must be the name of a class that {type(pipe).__name__} knows, such as {near}, got {prompt!r}"
        )
    return {"class_labels": pipe.get_label_ids([prompt])}


def warm_up(pipe: Any, prompt: str = "red apple") -> None:
    """A few untimed steps, so that the first timed run does not pay for set-up that happens once."""
    sampler = default_sampler(pipe)
    sample(with_sampler(pipe, sampler), Request(prompt, steps=MIN_STEPS, sampler=sampler))


def told_estimates(pipe: Any) -> AbstractContextManager[list[Tensor]]:
    """`estimates_of`, or a list that stays empty where the scheduler does not tell what it expects."""
    told = isinstance(pipe.scheduler, tuple(filter(None, SAMPLERS.values())))
    return estimates_of(pipe) if told else nullcontext([])


def run_baseline(pipe: Any, request: Request, on_step: OnStep | None = None) -> Baseline:
    """Sample without reuse and record what the model put out."""
    view = with_sampler(pipe, request.sampler)
    with record(view, on_step=on_step) as recording, told_estimates(view) as estimates:
        start = time.perf_counter()
        picture = sample(view, request)
        seconds = time.perf_counter() - start
    return Baseline(request, picture, recording, seconds - recording.trace.spent_seconds, estimates)


def run_observed(pipe: Any, request: Request, on_step: OnStep | None = None) -> Observation:
    """Sample without reuse once more, to see where features repeat and what `shown_blocks` hold; apart from the timed run."""
    view = with_sampler(pipe, request.sampler)
    keep = shown_blocks(depth_of(pipe))
    with observe(view, keep_blocks=keep) as observation, accelerate(view, ReuseConfig(1), on_step=on_step):
        sample(view, request)
    return observation


def run_variant(
    pipe: Any,
    request: Request,
    schedule: Schedule | AdaPolicy,
    replay: Recording | None = None,
    on_step: OnStep | None = None,
    storage: str = "latest",
) -> Variant:
    """Sample with a schedule or a policy; with a baseline's recording the steps it shares with the baseline are replayed.

    A policy knows what its reuse steps start from, and `storage` means nothing with one.
    """
    view = with_sampler(pipe, request.sampler)
    if isinstance(schedule, AdaPolicy):
        storage = schedule.config.storage_name
    session = accelerate(view, schedule, storage=rule_named(storage), replay=replay, on_step=on_step)
    with session as trace, told_estimates(view) as estimates:
        start = time.perf_counter()
        picture = sample(view, request)
        seconds = time.perf_counter() - start
    assert trace.schedule is not None
    return Variant(trace.schedule, picture, trace, seconds - trace.spent_seconds, estimates, storage)


def figures(baseline: Baseline, variant: Variant, distance: PerceptualDistance) -> dict[str, Any]:
    """Every figure of a comparison, as plain JSON values; the distances are to the baseline's picture."""
    return {
        "prompt": baseline.request.prompt,
        "seed": baseline.request.seed,
        "steps": baseline.request.steps,
        "guidance": baseline.request.guidance,
        "sampler": baseline.request.sampler,
        "schedule": str(variant.schedule),
        "num_blocks": variant.trace.num_blocks,
        "cutoff_block": variant.schedule.cutoff_block,
        "storage": variant.storage,
        "baseline_seconds": baseline.seconds,
        "seconds": variant.seconds,
        "speedup_measured": baseline.seconds / variant.seconds,
        "speedup_ideal": variant.trace.speedup_ideal,
        "block_evaluations": variant.trace.block_evaluations,
        "baseline_block_evaluations": variant.trace.baseline_block_evaluations,
        "lpips_name": distance.name,
        "cache_bytes": variant.trace.cache_bytes,
        "replayed_steps": sum(step.replayed for step in variant.trace.steps),
    } | difference(baseline.picture, variant.picture, distance)


def step_difference(baseline: Baseline, variant: Variant) -> list[float]:
    """How far the clean estimates are apart at every step: the norm of their difference over the baseline's, >= 0.

    Empty where the scheduler does not tell its estimates.
    """
    pairs = zip(baseline.estimates, variant.estimates, strict=True)
    return [float(vector_norm(theirs - ours) / vector_norm(ours)) for ours, theirs in pairs]


def fewer_steps(request: Request, speedup: float) -> Request:
    """The control beside every comparison: the same request with the number of steps that costs what the schedule costs."""
    return replace(request, steps=max(1, round(request.steps / speedup)))


def control_figures(baseline: Baseline, control: Baseline, distance: PerceptualDistance) -> dict[str, Any]:
    """The figures of a plain run with fewer steps against the baseline; its ideal speedup is the ratio of the steps."""
    steps = control.request.steps
    as_variant = Variant(Schedule.dense(steps), control.picture, control.recording.trace, control.outside_seconds)
    return figures(baseline, as_variant, distance) | {"steps": steps, "speedup_ideal": baseline.request.steps / steps}


def another_seed(request: Request) -> Request:
    """The same request from other noise: the next seed."""
    return replace(request, seed=request.seed + 1 if request.seed < MAX_SEED else 0)


def yardsticks(baseline: Baseline, another: Baseline, distance: PerceptualDistance) -> dict[str, dict[str, Any]]:
    """What a difference from the baseline's picture may be held against: it saved as a JPEG of quality 90, and another seed."""
    return {
        "jpeg": difference(baseline.picture, as_jpeg(baseline.picture), distance),
        "seed": difference(baseline.picture, another.picture, distance),
    }
