"""Rules for what a reuse step starts from: the paper's is the default, and the others keep the same contract."""

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


@pytest.mark.parametrize("points", [2, 3, 4])
def test_equal_outputs_are_continued_to_the_same_bits(points: int) -> None:
    value = torch.randn(50, generator=torch.Generator().manual_seed(0))
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
