"""Rules for what a reuse step starts from: the paper's is the default, and the others keep the same contract."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from analysis.experiment import Request, sample, with_sampler
from blockdance import ConfigError, Extrapolated, ReuseConfig, Schedule, accelerate, load_demo_pipeline, record
from blockdance.storage import Kept, Latest, Residual, StorageRule
from tests.test_contract import class_names, drive
from tests.tiny import BLOCKS, STEPS, Case

REUSING = ReuseConfig(3, 3, 0.3, 1.0)
RULES: list[StorageRule] = [Latest(), Extrapolated(), Extrapolated(points=3), Residual()]
NAMES = ["latest", "line", "parabola", "residual"]


def kept(position: float, value: Tensor, before: Tensor | None = None) -> Kept:
    return Kept(position, [], None if before is None else (before,), (value,))


def test_a_line_and_a_parabola_are_continued_exactly() -> None:
    at = [torch.tensor([2.0 * x + 1, x * x], dtype=torch.float64) for x in range(8)]
    (line,) = Extrapolated().outputs_at(7, [kept(2, at[2]), kept(5, at[5])], ())
    assert line[0].item() == pytest.approx(15) and line[1].item() == pytest.approx(4 + 7 * 5)
    (parabola,) = Extrapolated(points=3).outputs_at(7, [kept(1, at[1]), kept(2, at[2]), kept(5, at[5])], ())
    assert parabola.tolist() == pytest.approx([15, 49])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("points", [2, 3, 4])
def test_equal_outputs_are_continued_to_the_same_bits(points: int, dtype: torch.dtype) -> None:
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal / 2])
    value = torch.cat([torch.randn(50, generator=torch.Generator().manual_seed(0)), ends]).to(dtype)
    history = [kept(place, value.clone()) for place in (1, 4, 5, 8)][-points:]
    (continued,) = Extrapolated(points).outputs_at(10, history, ())
    assert torch.equal(continued, value)


def test_a_single_output_is_taken_as_it_is_and_never_shared() -> None:
    value = torch.randn(3)
    for rule in (Latest(), Extrapolated()):
        (taken,) = rule.outputs_at(4, [kept(2, value)], ())
        assert torch.equal(taken, value) and taken.data_ptr() != value.data_ptr()


def test_a_residual_follows_what_the_first_block_sees_now() -> None:
    (moved,) = Residual().outputs_at(4, [kept(2, torch.tensor([5.0]), torch.tensor([3.0]))], (torch.tensor([10.0]),))
    assert moved.item() == 12


@pytest.mark.parametrize("points", [1, 5, 2.0])
def test_points_outside_their_range_are_refused(points: int) -> None:
    with pytest.raises(ConfigError, match=r"points must be an integer in \[2, 4\], got "):
        Extrapolated(points)


HISTORY = [(1.0, 0.97), (2.0, -0.99), (5.0, 0.9), (6.0, 0.99)]
"""Places of cache steps, and shares of the largest number there: nearly all there is, and not smooth."""
NARROW = [torch.float16, torch.bfloat16, torch.float32]


def history(dtype: torch.dtype, points: int, device: str = "cpu") -> list[Kept]:
    largest = torch.finfo(dtype).max
    values = [(torch.tensor([share, -share, 0.1]) * largest).to(device, dtype) for _, share in HISTORY]
    places = [place for place, _ in HISTORY]
    return [kept(place, value, -value) for place, value in zip(places, values, strict=True)][-points:]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("rule", [Extrapolated(2), Extrapolated(3), Extrapolated(4), Residual()], ids=repr)
def test_what_is_stored_in_range_is_continued_in_range(rule: StorageRule, dtype: torch.dtype) -> None:
    before = history(dtype, rule.points)
    for now in (torch.finfo(dtype).max, torch.finfo(dtype).min):
        (started,) = rule.outputs_at(9, before, (torch.full((3,), now, dtype=dtype),))
        assert started.dtype is dtype and started.isfinite().all()


@pytest.mark.parametrize("points", [2, 3, 4])
def test_half_precision_is_continued_as_exactly_as_it_can_say(points: int) -> None:
    """Also where a step of the calculation leaves the range and the result does not."""
    numbers = torch.tensor([[6e4, -6e4], [-6.1e4, 100], [5e4, 6e4], [6.2e4, 4e3]])[-points:].half()
    places = [1.0, 2.0, 5.0, 6.0][-points:]
    exact = np.array([np.prod([(6.5 - b) / (a - b) for b in places if b != a]) for a in places]) @ numbers.double().numpy()
    (started,) = Extrapolated(points).outputs_at(6.5, [kept(*one) for one in zip(places, numbers, strict=True)], ())
    assert started.tolist() == pytest.approx(np.clip(exact, -65504, 65504), rel=1e-3)


def test_a_residual_of_half_precision_is_as_exact_where_the_change_alone_leaves_the_range() -> None:
    (moved,) = Residual().outputs_at(4, [kept(2, *torch.tensor([[6e4], [-6e4]]).half())], (torch.tensor([-6e4]).half(),))
    assert moved.item() == torch.tensor(6e4).half().item()


@pytest.mark.parametrize("points", [2, 3, 4])
def test_float32_has_the_bits_of_the_scheme_as_it_is_written(points: int) -> None:
    places = [1.0, 2.0, 5.0, 6.0][-points:]
    drawn = torch.randn(points, 200, generator=torch.Generator().manual_seed(0))
    values: list[Tensor] = list(drawn)
    for width in range(1, points):
        weights = [(9 - left) / (right - left) for left, right in zip(places, places[width:], strict=False)]
        values = [torch.lerp(a, b, weight) for a, b, weight in zip(values, values[1:], weights, strict=False)]
    before = [kept(place, value) for place, value in zip(places, drawn, strict=True)]
    assert torch.equal(Extrapolated(points).outputs_at(9, before, ())[0], values[0])
    (moved,) = Residual().outputs_at(9, [kept(6, drawn[0], drawn[1])], (drawn[0],))
    assert torch.equal(moved, drawn[0] + (drawn[0] - drawn[1]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("rule", [*RULES, Extrapolated(4)], ids=repr)
def test_no_rule_waits_for_the_device(rule: StorageRule, dtype: torch.dtype) -> None:
    """A tensor without numbers raises where the host would read one."""
    (started,) = rule.outputs_at(9, history(dtype, rule.points, "meta"), (torch.empty(3, dtype=dtype, device="meta"),))
    assert started.is_meta and started.shape == (3,)


def halved(value: Any) -> Any:
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_model_that_clips_its_massive_activations_stays_finite(case: Case, rule: StorageRule) -> None:
    """One channel grows over the run and stays in range, as diffusers' models clip it, but its continuation would not."""
    pipe = case.build()
    pipe.transformer.half()
    calls = itertools.count(1)

    def massive(_: object, __: object, output: Tensor) -> Tensor:
        grown = output.clone()
        grown[..., 0] = 20000 + 8000 * next(calls)
        return grown.clip(-65504, 65504)

    pipe.transformer.transformer_blocks[2].register_forward_hook(massive)
    inputs = {name: halved(value) for name, value in case.inputs().items()}
    with accelerate(pipe, Schedule.parse("fffccrr", 2), storage=rule) as trace:
        outputs = drive(case, pipe, [inputs] * 7)
    assert trace.kinds == "fffccrr"
    assert all(output.isfinite().all() for output in outputs)


def test_the_papers_rule_is_the_default(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, REUSING):
        default = case.run(pipe)
    with accelerate(pipe, REUSING, storage=Latest()):
        assert torch.equal(default, case.run(pipe))
    with accelerate(pipe, REUSING, storage=Extrapolated()):
        assert not torch.equal(default, case.run(pipe))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
class TestEveryRule:
    """What holds for the paper's rule holds for all."""

    def test_without_reuse_no_bit_changes(self, case: Case, rule: StorageRule) -> None:
        pipe = case.build()
        plain = case.run(pipe)
        with accelerate(pipe, ReuseConfig(1), storage=rule) as trace:
            assert torch.equal(plain, case.run(pipe))
        assert trace.block_evaluations == BLOCKS * STEPS and trace.cache_bytes == 0

    def test_the_same_blocks_run_and_the_pipeline_is_left_as_it_was(self, case: Case, rule: StorageRule) -> None:
        pipe = case.build()
        before, plain = class_names(pipe), case.run(pipe)
        with accelerate(pipe, REUSING, storage=rule) as trace:
            first = case.run(pipe)
            assert torch.equal(first, case.run(pipe))
        assert trace.kinds == "fffcrrcrrc" and trace.block_evaluations == 6 * BLOCKS + 4 * (BLOCKS - 4)
        assert class_names(pipe) == before and torch.equal(plain, case.run(pipe))

    def test_the_same_input_again_and_again_gives_the_same_output(self, case: Case, rule: StorageRule) -> None:
        pipe, inputs = case.build(), case.inputs()
        with accelerate(pipe, Schedule.parse("fccrcr", 3), storage=rule):
            outputs = drive(case, pipe, [inputs] * 6)
        for output in outputs:
            if rule.wants_inputs:  # a sum of three is equal to rounding only
                torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(output, outputs[0])

    @pytest.mark.parametrize("plan", [REUSING, Schedule.parse("cffffcrrcf", 2), Schedule.parse("crccrrffcr", 4)], ids=str)
    def test_a_replayed_run_has_the_bits_of_the_full_run(
        self, case: Case, rule: StorageRule, plan: ReuseConfig | Schedule
    ) -> None:
        pipe = case.build()
        with accelerate(pipe, plan, storage=rule) as full:
            expected = case.run(pipe)
        with record(pipe) as recording:
            case.run(pipe)
        with accelerate(pipe, plan, storage=rule, replay=recording) as trace:
            assert torch.equal(expected, case.run(pipe))
        assert trace.kinds == full.kinds
        shared = max(0, full.schedule.shared_prefix - (rule.points - 1))  # type: ignore[union-attr]
        assert [step.replayed for step in trace.steps] == [step < shared for step in range(STEPS)]

    def test_a_stored_tensor_that_does_not_fit_is_never_used(self, case: Case, rule: StorageRule) -> None:
        pipe = case.build()
        small, large = case.inputs(batch=2), case.inputs(batch=4)
        expected = drive(case, pipe, [large])[0]
        with accelerate(pipe, Schedule.parse("ccrcr", 3), storage=rule) as trace:
            outputs = drive(case, pipe, [small, small, large, small, large])
        assert trace.kinds == "ccccc"
        assert torch.equal(outputs[2], expected) and torch.equal(outputs[4], expected)

    def test_a_second_order_scheduler_gives_finite_results_twice_the_same(self, case: Case, rule: StorageRule) -> None:
        pipe = case.build()
        pipe.scheduler = HeunDiscreteScheduler()
        with accelerate(pipe, REUSING, storage=rule):
            first = case.run(pipe)
            assert torch.isfinite(first).all() and torch.equal(first, case.run(pipe))


def test_as_many_tensors_are_kept_as_the_rule_has_points(case: Case) -> None:
    held = {}
    for name, rule in zip(NAMES, RULES, strict=True):
        pipe = case.build()
        with accelerate(pipe, REUSING, storage=rule) as trace:
            case.run(pipe)
        held[name] = trace.cache_bytes
    assert held["line"] == 2 * held["latest"] and held["parabola"] == 3 * held["latest"]
    assert held["residual"] == 2 * held["latest"]


def test_a_line_through_the_last_two_cache_steps_is_closer_to_the_baseline_on_the_model_in_the_box() -> None:
    """What the extension is for, with the reuse of the comparison's middle setting."""
    view, request = with_sampler(load_demo_pipeline(), "DDIM"), Request("octopus")
    plain = sample(view, request).astype(int)
    errors = {}
    rules: list[StorageRule] = [Latest(), Extrapolated()]
    for rule in rules:
        with accelerate(view, ReuseConfig(3, 12, 0.25, 0.95), storage=rule):
            errors[rule.points] = np.abs(sample(view, request) - plain).mean()
    assert 0 < errors[2] < errors[1] / 1.5
