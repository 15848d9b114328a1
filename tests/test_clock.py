"""The schedule is placed on the steps that run, however the scheduler counts, slices, copies or delegates; or it is refused."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from torch import Tensor

from blockdance import ReuseConfig, Schedule, ScheduleError, SessionError, UnsupportedModelError, accelerate, observe, record
from blockdance.clock import Clock, evaluation_places
from tests.guided import MODELS, TWO, Guided
from tests.zoo import TEXT, WIDTH

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
KINDS = "fffcrcrcrc"
BY_NAME = {tiny.name: tiny for tiny in MODELS}


def words(seed: int) -> Tensor:
    return torch.randn(1, TEXT, WIDTH, generator=torch.Generator().manual_seed(seed))


# Slices


def test_a_run_that_begins_in_the_middle_counts_the_steps_it_runs(pipe: Guided) -> None:
    with accelerate(pipe, REUSING) as trace:
        pipe(steps=16, first=6)
    assert trace.kinds == str(trace.schedule) == KINDS
    with accelerate(pipe, Schedule.parse(KINDS, 1)) as trace:
        pipe(steps=16, first=6)
    assert trace.kinds == KINDS


def test_a_begin_that_is_told_twice_or_taken_back_is_one() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    clock = Clock(scheduler, 10)
    assert clock.begin_at(4) and not clock.begin_at(4)
    assert clock.num_steps == 6 and clock.index == 4
    assert clock.begin_at(0) and clock.num_steps == 10


class CopiesTimesteps(Guided):
    """Hands the transformer a timestep of its own making, as Flux does; only the scheduler's step tells which it was."""

    def predict(self, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        return super().predict(latent, timestep / 2 + 3, condition)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(), DPMSolverMultistepScheduler(), UniPCMultistepScheduler()],
    ids=lambda one: type(one).__name__,
)
@pytest.mark.parametrize("tiny", TWO, ids=lambda tiny: tiny.name)
def test_the_first_step_tells_where_a_run_begins_if_no_timestep_does(tiny: Any, scheduler: Any) -> None:
    pipe = CopiesTimesteps(tiny, copy.deepcopy(scheduler))
    with accelerate(pipe, REUSING) as trace, observe(pipe) as observation:
        pipe(steps=16, first=6)
    assert trace.kinds == str(trace.schedule) == KINDS
    assert observation.num_steps == 10 and observation.cosine().shape[1] == 10
    with accelerate(pipe, Schedule.parse(KINDS, 1)) as trace:
        pipe(steps=16, first=6)
    assert trace.kinds == KINDS
    with pytest.raises(ScheduleError, match="the schedule has 10 steps, the run has 16"), accelerate(pipe, Schedule.dense(10)):
        pipe(steps=16)


def test_a_recording_of_a_run_that_begins_in_the_middle_is_replayed(one_of_two: Guided) -> None:
    for pipe in (one_of_two, CopiesTimesteps(one_of_two.tiny)):
        with accelerate(pipe, REUSING):
            expected = pipe(steps=16, first=6)
        with record(pipe) as recording:
            pipe(steps=16, first=6)
        with accelerate(pipe, REUSING, replay=recording) as trace:
            assert torch.equal(expected, pipe(steps=16, first=6))
        assert [step.replayed for step in trace.steps] == [True] * 3 + [False] * 7


@pytest.mark.parametrize(("strength", "kinds"), [(1.0, "ffffffffcrcrcrcrcrcf"), (0.5, "ffffcrcrcr"), (0.4, "fffcrcrc")])
def test_video_to_video_is_as_image_to_image(strength: float, kinds: str) -> None:
    pipe = WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=BY_NAME["WanTransformer3DModel"].build(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with accelerate(pipe, ReuseConfig()) as trace:
        pipe(
            latents=torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(4)), prompt_embeds=words(1),
            negative_prompt_embeds=words(2), height=64, width=64, num_inference_steps=20, strength=strength,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    assert trace.kinds == str(trace.schedule) == kinds


# How schedulers count


@pytest.mark.parametrize(
    ("scheduler", "asked", "steps", "evaluations"),
    [
        (SCMScheduler(prediction_type="trigflow", sigma_data=0.5), {"intermediate_timesteps": None}, 8, 8),
        (DDPMWuerstchenScheduler(), {}, 8, 8),
        (PNDMScheduler(skip_prk_steps=True), {}, 9, 9),
        (PNDMScheduler(), {}, 8, 17),
        (HeunDiscreteScheduler(), {}, 8, 15),
        (DDIMScheduler(), {}, 8, 8),
        (FlowMatchEulerDiscreteScheduler(), {}, 8, 8),
    ],
    ids=lambda one: type(one).__name__,
)
def test_the_evaluations_of_a_run(scheduler: Any, asked: dict[str, Any], steps: int, evaluations: int) -> None:
    """Of 8 steps asked for; the plain multistep form of PNDM evaluates one step twice, which counts as a step of its own."""
    scheduler.set_timesteps(8, **asked)
    places = evaluation_places(scheduler, 8)
    assert (places[-1][0] + 1, len(places)) == (steps, evaluations)


class Backwards(FlowMatchEulerDiscreteScheduler):
    """Takes the arguments of `step` in an order of its own."""

    def step(self, sample: Tensor, prediction: Tensor, t: Tensor, **more: Any) -> Any:  # type: ignore[override]
        return super().step(prediction, t, sample, **more)


@pytest.mark.parametrize("tiny", TWO, ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("by_name", [True, False])
def test_the_stepped_latent_is_found_by_its_name(tiny: Any, by_name: bool) -> None:
    rows: list[int] = []

    class Loop(Guided):
        @torch.no_grad()
        def __call__(self, steps: int = 10, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
            latent = self.latent()
            self.scheduler.set_timesteps(steps)
            for timestep in self.scheduler.timesteps:
                output = self.predict(latent, timestep, self.conditions[0])
                if by_name:
                    step = self.scheduler.step(t=timestep, prediction=output, sample=latent, return_dict=False)
                else:
                    step = self.scheduler.step(latent, output, timestep, return_dict=False)
                latent = step[0]
            return latent

    pipe = Loop(tiny, Backwards(shift=3.0))
    with accelerate(pipe, REUSING) as trace, observe(pipe) as observation:
        pipe()
    assert trace.kinds == KINDS and observation.branches == ["conditional"]
    rows.append(observation.cosine().shape[2])
    assert rows == [1]


def test_cogvideox_runs_with_its_own_scheduler() -> None:
    transformer = BY_NAME["CogVideoXTransformer3DModel"].build()
    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDPMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    with accelerate(pipe, REUSING) as trace:
        pipe(
            prompt_embeds=words(1), negative_prompt_embeds=words(2), height=64, width=64, num_frames=5, num_inference_steps=10,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    assert trace.kinds == KINDS


# Proxies, copies, replacements


class Proxy:
    """Hands every method on, as the thread-safe schedulers of servers do."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["inner"], name, value)


class Slotted:
    """Cannot be given another class."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def set_timesteps(self, *args: Any) -> None:
        self.inner.set_timesteps(*args)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.step(*args, **kwargs)


def test_a_scheduler_behind_a_proxy_is_followed(one_of_two: Guided) -> None:
    pipe = one_of_two
    with accelerate(pipe, REUSING):
        expected = pipe()
    inner = type(pipe.scheduler)
    pipe.scheduler = Proxy(pipe.scheduler)
    with accelerate(pipe, REUSING) as trace:
        assert torch.equal(expected, pipe())
    assert trace.kinds == KINDS
    assert type(pipe.scheduler) is Proxy and type(pipe.scheduler.__dict__["inner"]) is inner


def test_a_scheduler_that_cannot_be_followed_is_refused_at_once(one_of_two: Guided) -> None:
    one_of_two.scheduler = Slotted(one_of_two.scheduler)
    before = type(one_of_two.transformer)
    with pytest.raises(UnsupportedModelError, match="Slotted cannot be followed"), accelerate(one_of_two, REUSING):
        pass
    assert type(one_of_two.transformer) is before


def test_a_scheduler_replaced_inside_is_named(one_of_two: Guided) -> None:
    with accelerate(one_of_two, REUSING):
        one_of_two()
        one_of_two.scheduler = DDIMScheduler()
        with pytest.raises(SessionError, match=r"replaced inside the with block \(FlowMatchEuler.* by DDIMScheduler\)"):
            one_of_two()


@pytest.mark.parametrize("steps", [4, 10, 30])
def test_a_pipeline_that_steps_copies_of_its_scheduler_is_refused_or_says_so(one_of_two: Guided, steps: int) -> None:
    pipe = one_of_two
    plain = pipe(steps=steps)

    class Copies(Guided):
        def step(self) -> Tensor:
            with torch.no_grad():
                latent = self.latent()
                self.scheduler.set_timesteps(steps)
                scheduler = copy.deepcopy(self.scheduler)
                for timestep in scheduler.timesteps:
                    outputs = [self.predict(latent, timestep, condition) for condition in self.conditions]
                    latent = scheduler.step(torch.stack(outputs).mean(dim=0), timestep, latent, return_dict=False)[0]
                return latent

    pipe = Copies(pipe.tiny)
    if steps > 8:
        with accelerate(pipe, REUSING), pytest.raises(SessionError, match="this pipeline steps copies of its scheduler"):
            pipe.step()
        return
    with pytest.warns(UserWarning, match="scheduler was not stepped"), accelerate(pipe, REUSING) as trace:
        assert torch.equal(plain, pipe.step())
    assert trace.note is not None


def test_wan_text_to_video_with_the_scheduler_it_ships_with() -> None:
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=BY_NAME["WanTransformer3DModel"].build(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with accelerate(pipe, REUSING) as trace:
        pipe(
            prompt_embeds=words(1), negative_prompt_embeds=words(99), height=64, width=64, num_frames=5, num_inference_steps=10,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    assert trace.kinds == KINDS
