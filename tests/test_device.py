"""Inside a run the host never waits for the device: on the meta device, whatever would wait raises."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from blockdance import BlockDanceConfig, Extrapolated, ReuseConfig, Schedule, accelerate, apply_block_dance
from blockdance import trace as trace_module
from blockdance.schedule import StepKind
from blockdance.trace import FinishedStep, Trace
from tests.guided import MODELS, TWO, Guided

REUSING = ReuseConfig(2, 1, 0.3, 1.0)
READ_ON_THE_HOST = ("Lumina2Transformer2DModel", "ZImageTransformer2DModel")
"""Models whose own forward waits for the device."""
NEED_A_REAL_DEVICE = ("MochiTransformer3DModel", "HunyuanVideo15Transformer3DModel")


class MetaScheduler:
    """Counts, and hands the latent on; its timesteps lie on the device, as those of pipelines do."""

    order = 1

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.linspace(999, 1, num_inference_steps).to("meta")

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (sample + model_output,)


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_meta, value))
    return value


class Meta(Guided):
    """All of its tensors are on the meta device."""

    def __init__(self, tiny: Any) -> None:
        super().__init__(tiny, MetaScheduler())
        self.transformer.to("meta")
        self.conditions = [{name: on_meta(value) for name, value in one.items()} for one in self.conditions]

    def latent(self, seed: int = 0) -> Tensor:
        return super().latent(seed).to("meta")


@pytest.fixture(params=TWO, ids=lambda tiny: tiny.name)
def one_of_two(request: pytest.FixtureRequest) -> Meta:
    return Meta(request.param)


@pytest.fixture(params=MODELS, ids=lambda tiny: tiny.name)
def pipe(request: pytest.FixtureRequest) -> Meta:
    pipe = Meta(request.param)
    try:
        pipe(steps=1)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        if request.param.name not in (*READ_ON_THE_HOST, *NEED_A_REAL_DEVICE):
            pytest.fail(f"the plain model reads the device: {error}")
        pytest.skip("the plain model reads the device itself")
    return pipe


def test_accelerate_never_waits(pipe: Meta) -> None:
    for storage in (None, Extrapolated()):
        with accelerate(pipe, Schedule.parse("ccr", 1), storage=storage) as trace:
            pipe(steps=3)
        assert trace.kinds == "ccr"


def test_apply_never_waits_where_the_timestep_is_the_schedulers(one_of_two: Meta) -> None:
    class Direct(Meta):
        def predict(self, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
            inputs = {self.tiny.latent: latent, "timestep": timestep.expand(1)}
            output: Tensor = self.transformer(**condition | inputs, return_dict=False)[0]
            return output

    direct = Direct(one_of_two.tiny)
    ran: list[int] = []
    applied = apply_block_dance(direct.transformer, BlockDanceConfig(2, 1, 0.3, 1.0, num_steps=10))
    blocks = applied.session().denoisers[0].blocks
    blocks[0].module.register_forward_hook(lambda *_: ran.append(0))
    for _ in range(2):
        direct()
    applied.remove()
    assert len(ran) == 2 * 2 * 7  # two runs of two branches; three of ten steps reuse


class Event:
    """Stands in for an event of a GPU: it knows its time, and writes down who waits for it."""

    waited: list[float]

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def synchronize(self) -> None:
        Event.waited.append(self.seconds)

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.seconds - self.seconds)


def test_seconds_are_read_when_somebody_asks(one_of_two: Meta, monkeypatch: pytest.MonkeyPatch) -> None:
    Event.waited, clock = [], iter(range(100))
    monkeypatch.setattr(trace_module, "mark", lambda device: Event(float(next(clock))))
    told: list[int] = []
    with accelerate(one_of_two, REUSING, on_step=lambda step, _: told.append(step)) as trace:
        one_of_two()
    assert told == list(range(10)) and Event.waited == []
    assert trace.kinds == "fffcrcrcrc" and trace.block_evaluations < trace.baseline_block_evaluations
    assert Event.waited == []
    assert [step.seconds for step in trace.steps] == [1.0] * 10 and len(Event.waited) == 10
    assert trace.seconds == 10.0 and len(Event.waited) == 10


def test_a_trace_is_pickled_with_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.waited = []
    trace = Trace(4)
    for step in range(2):
        begin, end = Event(float(step)), Event(step + 0.5)
        trace._finished.append(FinishedStep(StepKind.FULL, 4, 4, None, begin, end))  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(trace))
    assert again == trace and again.seconds == 1.0
