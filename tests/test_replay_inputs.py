"""A replay is refused unless everything that an output depends on is the same, at any depth and on the model itself."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blockdance import Recording, ReuseConfig, Schedule, SessionError, accelerate, record
from blockdance.arguments import leaves_of, same_value
from tests.guided import MODELS, Guided

PLAN = Schedule.parse("ffffffcrcr", 1)
NAMES = ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")


class Loose(Guided):
    """Hands the transformer further arguments, which it ignores: what they hold is for the comparison alone."""

    def __init__(self, tiny: Any) -> None:
        super().__init__(tiny)
        self.more: dict[str, Any] = {}
        forward = type(self.transformer).forward

        class WithMore(type(self.transformer)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                del kwargs["more"]
                return forward(self, *args, **kwargs)

        WithMore.__name__ = type(self.transformer).__name__
        self.transformer.__class__ = WithMore

    def predict(self, latent: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        return super().predict(latent, timestep, condition | {"more": self.more})


@pytest.fixture(params=NAMES)
def pipe(request: pytest.FixtureRequest) -> Loose:
    return Loose(next(tiny for tiny in MODELS if tiny.name == request.param))


def recorded(pipe: Guided) -> Recording:
    with record(pipe) as recording:
        pipe()
    return recording


def check_refused(pipe: Guided, recording: Recording) -> None:
    with (
        accelerate(pipe, PLAN, replay=recording),
        pytest.raises(SessionError, match=r"cannot be replayed|no step can be replayed"),
    ):
        pipe()


def check_accepted(pipe: Guided, recording: Recording) -> None:
    with accelerate(pipe, PLAN):
        expected = pipe()
    with accelerate(pipe, PLAN, replay=recording) as trace:
        assert torch.equal(expected, pipe())
    assert sum(step.replayed for step in trace.steps) == 6


ARGUMENTS: list[tuple[Any, Any]] = [
    ([torch.ones(2), torch.zeros(2)], [torch.ones(2), torch.full((2,), 0.5)]),
    ({"deep": [{"down": (torch.ones(1),)}]}, {"deep": [{"down": (torch.zeros(1),)}]}),
    ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
    ({"scale": 1.0}, {"scale": 0.0}),
    ({"scale": 1}, {"scale": 1.0}),
    ({"mode": "depth"}, {"mode": "canny"}),
    ({"a": 1}, {"b": 1}),
    (True, False),
    (None, torch.ones(1)),
    (np.arange(3), np.arange(3)[::-1]),
    (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    (torch.ones(2), torch.ones(1, 2)),
]


@pytest.mark.parametrize(("ours", "theirs"), ARGUMENTS, ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_another_argument_at_any_depth_is_refused(pipe: Loose, ours: Any, theirs: Any, swap: bool) -> None:
    pipe.more = theirs if swap else ours
    recording = recorded(pipe)
    pipe.more = copy.deepcopy(pipe.more)
    check_accepted(pipe, recording)
    pipe.more = ours if swap else theirs
    check_refused(pipe, recording)


def test_every_value_has_a_place() -> None:
    found = dict(leaves_of({"a": [1, {"b": (2, "x")}], "c": None, "d": []}))
    assert {name: value for name, value in found.items() if not name.endswith(".")} == {
        "a.0": 1, "a.1.b.0": 2, "a.1.b.1": "x", "c": None,
    }  # fmt: skip
    assert not same_value(float("nan"), 1.0) and not same_value(object(), object())


# The model


def scaled(pipe: Guided) -> None:
    next(one for one in pipe.transformer.parameters() if one.ndim > 1).data.mul_(1.5)


def loaded(pipe: Guided) -> None:
    weights = {name: value + 1 for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(weights)


def a_buffer(pipe: Guided) -> None:
    pipe.transformer.register_buffer("extra", torch.ones(1))


def in_half(pipe: Guided) -> None:
    pipe.transformer.to(torch.float64).to(torch.float32)
    next(pipe.transformer.parameters()).data = next(pipe.transformer.parameters()).data.half().float()


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, and what PEFT's layers say of themselves."""

    disable_adapters = False
    merged_adapters: tuple[str, ...] = ()

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.scaling, self.active_adapters = {"default": 1.0}, ["default"]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + self.scaling["default"] * self.up(self.down(x)) if not self.disable_adapters else out


def adapters_of(pipe: Guided) -> list[Adapted]:
    return [module for module in pipe.transformer.modules() if isinstance(module, Adapted)]


def adapt(pipe: Guided) -> None:
    torch.manual_seed(3)
    for name, module in list(pipe.transformer.named_modules()):
        if name.endswith("to_q"):
            parent = pipe.transformer.get_submodule(name.rpartition(".")[0])
            parent.to_q = Adapted(module)
    pipe.transformer.peft_config = {"default": object()}


def weaker(pipe: Guided) -> None:
    for layer in adapters_of(pipe):
        layer.scaling["default"] = 0.1


def switched_off(pipe: Guided) -> None:
    for layer in adapters_of(pipe):
        layer.disable_adapters = True


def other_weights(pipe: Guided) -> None:
    adapters_of(pipe)[-1].up.weight.data.add_(0.5)


@pytest.mark.parametrize("change", [scaled, loaded, a_buffer], ids=lambda change: change.__name__)
def test_other_weights_are_refused(pipe: Loose, change: Callable[[Guided], None]) -> None:
    recording = recorded(pipe)
    check_accepted(pipe, recording)
    change(pipe)
    check_refused(pipe, recording)


@pytest.mark.parametrize("change", [weaker, switched_off, other_weights], ids=lambda change: change.__name__)
def test_other_adapters_or_scales_are_refused(pipe: Loose, change: Callable[[Guided], None]) -> None:
    adapt(pipe)
    recording = recorded(pipe)
    check_accepted(pipe, recording)
    change(pipe)
    check_refused(pipe, recording)


@pytest.mark.parametrize("change", [weaker, switched_off], ids=lambda change: change.__name__)
def test_adapters_switched_in_the_run_make_its_next_step_a_cache_step(pipe: Loose, change: Callable[[Guided], None]) -> None:
    adapt(pipe)
    with accelerate(pipe, ReuseConfig(2, 1, 0.3, 1.0)) as trace:
        pipe(after=lambda pipe, step, _: change(pipe) if step == 3 else None)
    assert trace.kinds == "fffcccrcrc"


def test_peft_s_own_layers_are_looked_at() -> None:
    peft = pytest.importorskip("peft")
    pipe = Guided(next(tiny for tiny in MODELS if tiny.name == "FluxTransformer2DModel"))
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    recording = recorded(pipe)
    check_accepted(pipe, recording)
    pipe.transformer.set_adapters("default", 0.1)
    check_refused(pipe, recording)


def test_a_recording_survives_a_pickle_and_serves_a_model_of_the_same_weights(pipe: Loose) -> None:
    recording = pickle.loads(pickle.dumps(recorded(pipe)))
    assert recording.trace.kinds == "f" * 10
    check_accepted(pipe, recording)
    twin = Loose(pipe.tiny)
    check_accepted(twin, recording)
    scaled(twin)
    check_refused(twin, recording)
