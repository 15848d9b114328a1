"""Replay: a recorded baseline stands in for the steps it shares with an accelerated run, bit for bit, or is refused."""

import copy
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from blockdance import Recording, ReuseConfig, Schedule, SessionError, Trace, accelerate, record
from tests.tiny import BLOCKS, STEPS, Case, dit, pixart, run_dit, run_pixart

PLANS: list[ReuseConfig | Schedule] = [
    ReuseConfig(2, 3, 0.3, 1.0),
    ReuseConfig(3, 1, 0.5, 0.9),
    ReuseConfig(2, 4, 0.0, 1.0),
    Schedule.parse("fcfccrrffr", 2),
]


def prefix_of(trace: Trace) -> int:
    assert trace.schedule is not None
    return trace.schedule.shared_prefix


def cancelled_recording(case: Case, pipe: Any, last_step: int) -> Recording:
    """A recording whose run was cancelled right after `last_step`."""

    def stop(step: int, num_steps: int) -> None:
        if step == last_step:
            raise InterruptedError

    with pytest.raises(InterruptedError), record(pipe, on_step=stop) as recording:
        case.run(pipe)
    return recording


def count_blocks(pipe: Any) -> list[int]:
    """A list that gets the index of every block that really runs from now on."""
    ran: list[int] = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def drive(pipe: Any, calls_per_step: list[list[dict[str, Any]]]) -> list[list[Tensor]]:
    """Call the transformer directly, as often per step as there are arguments for it."""
    pipe.scheduler.set_timesteps(len(calls_per_step))
    outputs = []
    with torch.no_grad():
        for timestep, calls in zip(pipe.scheduler.timesteps, calls_per_step, strict=True):
            outputs.append([pipe.transformer(**kwargs)[0] for kwargs in calls])
            pipe.scheduler.step(torch.zeros(2, 4, 8, 8), timestep, torch.zeros(2, 4, 8, 8))
    return outputs


def test_recording_changes_no_bit_and_traces_the_baseline(case: Case) -> None:
    pipe = case.build()
    plain = case.run(pipe)
    with record(pipe) as recording:
        assert torch.equal(plain, case.run(pipe))
    assert torch.equal(plain, case.run(pipe))
    assert str(recording.trace.schedule) == recording.trace.kinds == "f" * STEPS
    assert recording.trace.block_evaluations == recording.trace.baseline_block_evaluations == STEPS * BLOCKS
    assert not any(step.replayed for step in recording.trace.steps)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_a_replayed_run_has_the_bits_of_the_full_run(case: Case, plan: ReuseConfig | Schedule, guided: bool) -> None:
    pipe = case.build()
    with accelerate(pipe, plan):
        full = case.run(pipe, guided=guided, batch=2)
    with record(pipe) as recording:
        plain = case.run(pipe, guided=guided, batch=2)
    with accelerate(pipe, plan, replay=recording):
        replayed = case.run(pipe, guided=guided, batch=2)
    assert torch.equal(full, replayed)
    assert not torch.equal(plain, replayed)


def test_one_recording_serves_many_settings(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    for plan in (*PLANS, *PLANS[:2]):
        with accelerate(pipe, plan):
            full = case.run(pipe)
        with accelerate(pipe, plan, replay=recording):
            assert torch.equal(full, case.run(pipe))


@pytest.mark.parametrize("plan", PLANS)
def test_exactly_the_shared_prefix_is_replayed_and_the_cache_step_runs(case: Case, plan: ReuseConfig | Schedule) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    ran, per_step = count_blocks(pipe), list[int]()

    def on_step(step: int, num_steps: int) -> None:
        per_step.append(len(ran))
        ran.clear()

    with accelerate(pipe, plan, replay=recording, on_step=on_step) as trace:
        case.run(pipe)
    schedule, prefix = trace.schedule, prefix_of(trace)
    assert schedule is not None and str(schedule)[prefix : prefix + 2] == "cr"
    assert [step.replayed for step in trace.steps] == [step < prefix for step in range(STEPS)]
    assert per_step == [0 if step < prefix else schedule.blocks_at(step, BLOCKS) for step in range(STEPS)]
    assert trace.kinds == str(schedule)


def test_without_reuse_the_whole_run_is_replayed_and_no_block_runs(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        plain = case.run(pipe)
    ran = count_blocks(pipe)
    with accelerate(pipe, ReuseConfig(1), replay=recording) as trace:
        assert torch.equal(plain, case.run(pipe))
    assert ran == []
    assert all(step.replayed for step in trace.steps)
    assert trace.speedup_over(recording.trace) == 1.0
    assert trace.speedup_ideal == 1.0


@pytest.mark.parametrize("plan", PLANS)
def test_replay_flatters_no_figure(case: Case, plan: ReuseConfig | Schedule) -> None:
    pipe = case.build()
    with accelerate(pipe, plan) as full:
        case.run(pipe)
    with record(pipe) as recording:
        case.run(pipe)
    with accelerate(pipe, plan, replay=recording) as replayed:
        case.run(pipe)
    assert [step.blocks_evaluated for step in replayed.steps] == [step.blocks_evaluated for step in full.steps]
    assert [step.blocks_total for step in replayed.steps] == [step.blocks_total for step in full.steps]
    assert replayed.block_evaluations == full.block_evaluations
    assert replayed.speedup_ideal == full.speedup_ideal
    assert replayed.cache_bytes == full.cache_bytes


def test_replayed_steps_count_with_the_seconds_they_took_when_recorded(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    with accelerate(pipe, PLANS[0], replay=recording) as trace:
        case.run(pipe)
    prefix = prefix_of(trace)
    recorded, replayed, run = recording.trace.steps[:prefix], trace.steps[:prefix], trace.steps[prefix:]
    assert [step.seconds for step in replayed] == [step.seconds for step in recorded]
    assert all(step.seconds != step.spent_seconds for step in replayed)
    assert all(step.seconds == step.spent_seconds for step in run)
    assert trace.seconds == pytest.approx(sum(step.seconds for step in (*recorded, *run)))
    assert trace.spent_seconds == pytest.approx(sum(step.spent_seconds for step in trace.steps))


def test_a_recording_is_not_changed_by_its_use(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    inputs, outputs, trace = copy.deepcopy((recording.inputs, recording.outputs, recording.trace))
    results = []
    for _ in range(2):
        with accelerate(pipe, PLANS[0], replay=recording):
            results.append(case.run(pipe))
    assert torch.equal(*results)
    assert recording.trace == trace
    assert recording.inputs.keys() == inputs.keys() and recording.outputs.keys() == outputs.keys()
    assert all(torch.equal(a, b) for key in inputs for a, b in zip(inputs[key], recording.inputs[key], strict=True))
    assert all(torch.equal(outputs[key][0], recording.outputs[key][0]) for key in outputs)


@pytest.mark.parametrize("as_dict", [True, False])
def test_writing_into_what_the_model_returned_does_not_spoil_the_recording(case: Case, as_dict: bool) -> None:
    pipe = case.build()
    kwargs = case.inputs() | {"return_dict": as_dict}
    with record(pipe) as recording:
        returned = drive(pipe, [[kwargs]])[0][0]
    expected = returned.clone()
    for _ in range(2):
        returned.zero_()
        with accelerate(pipe, Schedule.dense(1), replay=recording):
            returned = drive(pipe, [[kwargs]])[0][0]
        assert torch.equal(returned, expected)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_input_overwritten_after_recording_is_refused_and_its_old_value_accepted(case: Case, place: int) -> None:
    pipe = case.build()
    kwargs = case.inputs()
    name = list(kwargs)[place]
    before = kwargs | {name: kwargs[name].clone()}
    with record(pipe) as recording:
        expected = drive(pipe, [[kwargs]])[0][0]
    kwargs[name].add_(1)
    with accelerate(pipe, Schedule.dense(1), replay=recording):
        with pytest.raises(SessionError, match="step 0 cannot be replayed"):
            drive(pipe, [[kwargs]])
        assert torch.equal(drive(pipe, [[before]])[0][0], expected)


@pytest.mark.parametrize(
    "other",
    [
        {"added_cond_kwargs": {"resolution": torch.full((2, 2), 1024.0), "aspect_ratio": torch.ones(2, 1)}},
        {"encoder_attention_mask": torch.ones(2, 5)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_difference_in_a_nested_or_a_further_input_is_refused(other: dict[str, Any]) -> None:
    pipe = pixart()
    size = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}
    kwargs = Case("pixart", pixart, run_pixart).inputs() | {"added_cond_kwargs": size}
    with record(pipe) as recording:
        drive(pipe, [[kwargs]])
    with accelerate(pipe, Schedule.dense(1), replay=recording):
        drive(pipe, [[kwargs]])
        with pytest.raises(SessionError, match="step 0 cannot be replayed"):
            drive(pipe, [[kwargs | other]])


def test_the_branches_of_guidance_in_two_calls_are_replayed_apart(case: Case) -> None:
    pipe = case.build()
    calls = [[case.inputs(), case.inputs()]] * 4
    schedule = Schedule.parse("ffcr", 3)
    with accelerate(pipe, schedule):
        full = drive(pipe, calls)
    with record(pipe) as recording:
        drive(pipe, calls)
    with accelerate(pipe, schedule, replay=recording) as trace:
        replayed = drive(pipe, calls)
    assert all(torch.equal(full[step][branch], replayed[step][branch]) for step in range(4) for branch in range(2))
    assert [step.replayed for step in trace.steps] == [True, True, False, False]
    assert trace.block_evaluations == 2 * schedule.block_evaluations(BLOCKS)


def test_a_second_order_scheduler_replays_both_evaluations_of_a_step() -> None:
    pipe = pixart()
    pipe.scheduler = HeunDiscreteScheduler()
    with accelerate(pipe, PLANS[0]):
        full = run_pixart(pipe)
    with record(pipe) as recording:
        run_pixart(pipe)
    ran = count_blocks(pipe)
    with accelerate(pipe, PLANS[0], replay=recording) as trace:
        assert torch.equal(full, run_pixart(pipe))
    prefix = prefix_of(trace)
    assert [step.replayed for step in trace.steps] == [step < prefix for step in range(STEPS)]
    assert [step.seconds for step in trace.steps[:prefix]] == [step.seconds for step in recording.trace.steps[:prefix]]
    assert len(ran) == trace.block_evaluations - 2 * prefix * BLOCKS


def test_a_second_run_inside_record_replaces_the_first(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe, seed=1, steps=STEPS + 5)
        plain = case.run(pipe, seed=2)
    assert len(recording.trace.steps) == STEPS
    assert {step for step, _, _ in recording.outputs} == {step for step, _, _ in recording.inputs} == set(range(STEPS))
    with accelerate(pipe, ReuseConfig(1), replay=recording):
        assert torch.equal(plain, case.run(pipe, seed=2))


@pytest.mark.parametrize("other", [{"seed": 1}, {"steps": STEPS - 1}, {"steps": 2 * STEPS}, {"batch": 2}, {"guided": False}])
@pytest.mark.parametrize("swap", [False, True], ids=["recorded default", "recorded other"])
def test_a_recording_of_another_call_is_refused(case: Case, other: dict[str, Any], swap: bool) -> None:
    pipe = case.build()
    recorded, asked = (other, {}) if swap else ({}, other)
    with record(pipe) as recording:
        case.run(pipe, **recorded)
    with accelerate(pipe, ReuseConfig(2, 3, 0.3, 1.0)):
        full = case.run(pipe, **recorded)
    with accelerate(pipe, ReuseConfig(2, 3, 0.3, 1.0), replay=recording):
        with pytest.raises(SessionError, match="step 0 cannot be replayed: the recording was made with another"):
            case.run(pipe, **asked)
        assert torch.equal(full, case.run(pipe, **recorded))


@pytest.mark.parametrize(("label", "scale", "step"), [(2, 4.0, 0), (1, 7.0, 1)])
def test_another_class_or_guidance_scale_is_refused_at_the_first_step_it_changes(label: int, scale: float, step: int) -> None:
    pipe = dit()
    with record(pipe) as recording:
        run_dit(pipe)
    with (
        accelerate(pipe, PLANS[0], replay=recording),
        pytest.raises(SessionError, match=f"step {step} cannot be replayed: .* another prompt, seed, .* or guidance"),
    ):
        pipe([label], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), guidance_scale=scale)


def test_a_recording_of_another_transformer_is_refused_at_once(case: Case) -> None:
    pipe, twin = case.build(), case.build()
    with record(pipe) as recording:
        case.run(pipe)
    with pytest.raises(SessionError, match="another transformer"), accelerate(twin, PLANS[0], replay=recording):
        pass
    assert type(twin.transformer) is type(pipe.transformer)


def test_a_cancelled_recording_serves_the_steps_it_has_and_no_further(case: Case) -> None:
    pipe = case.build()
    recording = cancelled_recording(case, pipe, last_step=2)
    with accelerate(pipe, ReuseConfig(2, 3, 0.3, 1.0)):
        full = case.run(pipe)
    with accelerate(pipe, ReuseConfig(2, 3, 0.3, 1.0), replay=recording):
        assert torch.equal(full, case.run(pipe))
    with (
        accelerate(pipe, ReuseConfig(2, 3, 0.4, 1.0), replay=recording),
        pytest.raises(SessionError, match="step 3 cannot be replayed"),
    ):
        case.run(pipe)


def test_a_step_that_failed_while_recording_is_missing(case: Case) -> None:
    pipe = case.build()

    def fail_at_step_2(step: int, num_steps: int) -> None:
        if step == 1:
            pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError), record(pipe, on_step=fail_at_step_2) as recording:
        case.run(pipe)
    with (
        accelerate(pipe, ReuseConfig(1), replay=recording),
        pytest.raises(SessionError, match="step 2 cannot be replayed"),
    ):
        case.run(pipe)


def test_a_step_whose_model_ran_but_whose_scheduler_failed_is_missing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = case.build()

    def fail_at_step_2(step: int, num_steps: int) -> None:
        if step == 1:
            monkeypatch.setattr(pipe.scheduler, "_get_variance", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError), record(pipe, on_step=fail_at_step_2) as recording:
        case.run(pipe)
    monkeypatch.undo()
    with (
        accelerate(pipe, ReuseConfig(1), replay=recording),
        pytest.raises(SessionError, match="step 2 cannot be replayed"),
    ):
        case.run(pipe)


def test_an_empty_recording_is_refused(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        pass
    with accelerate(pipe, PLANS[0], replay=recording), pytest.raises(SessionError, match="step 0 cannot be replayed"):
        case.run(pipe)
