"""The trace: what really ran, as numbers that add up and as JSON."""

import json
import time
from typing import Any

import pytest
from diffusers import HeunDiscreteScheduler

from blockdance import ReuseConfig, Schedule, StepKind, StepRecord, Trace, accelerate, record
from tests.tiny import BLOCKS, STEPS, Case, pixart, run_pixart

TOKENS, WIDTH, FLOAT_BYTES = 16, 16, 4


def traced(case: Case, plan: ReuseConfig | Schedule, **arguments: Any) -> Trace:
    pipe = case.build()
    with accelerate(pipe, plan) as trace:
        case.run(pipe, **arguments)
    return trace


def stepped(seconds: float, spent_seconds: float, blocks_evaluated: int = 4) -> StepRecord:
    return StepRecord(StepKind.FULL, blocks_evaluated, 4, seconds, seconds != spent_seconds, spent_seconds)


def test_json_comes_back_with_the_values_of_the_run(case: Case) -> None:
    schedule = Schedule.parse("ffccrrfcrf", 3)
    trace = traced(case, schedule)
    loaded = json.loads(trace.to_json())
    assert loaded == trace.to_dict()
    assert loaded | {"seconds": None, "steps": None} == {
        "schedule": "ffccrrfcrf",
        "cutoff_block": 3,
        "num_blocks": BLOCKS,
        "note": None,
        "seconds": None,
        "block_evaluations": schedule.block_evaluations(BLOCKS),
        "baseline_block_evaluations": STEPS * BLOCKS,
        "speedup_ideal": schedule.ideal_speedup(BLOCKS),
        "cache_bytes": 2 * TOKENS * WIDTH * FLOAT_BYTES,
        "steps": None,
    }
    assert loaded["seconds"] == trace.seconds


def test_each_step_in_json_has_its_kind_and_blocks(case: Case) -> None:
    schedule = Schedule.parse("fcrrfcr", 1)
    steps = json.loads(traced(case, schedule, steps=7).to_json())["steps"]
    assert [set(step) for step in steps] == [
        {"kind", "blocks_evaluated", "blocks_total", "seconds", "replayed", "spent_seconds"}
    ] * 7
    assert "".join(step["kind"] for step in steps) == "fcrrfcr"
    assert [step["blocks_evaluated"] for step in steps] == [schedule.blocks_at(step, BLOCKS) for step in range(7)]
    assert [step["blocks_total"] for step in steps] == [BLOCKS] * 7
    assert [step["replayed"] for step in steps] == [False] * 7


def test_the_json_of_a_recording_tells_of_the_baseline(case: Case) -> None:
    pipe = case.build()
    with record(pipe) as recording:
        case.run(pipe)
    loaded = json.loads(recording.trace.to_json())
    assert loaded["schedule"] == "f" * STEPS
    assert (loaded["cache_bytes"], loaded["speedup_ideal"], loaded["note"]) == (0, 1.0, None)
    assert loaded["block_evaluations"] == loaded["baseline_block_evaluations"] == STEPS * BLOCKS


def test_before_a_run_the_trace_is_empty_and_says_so_in_json(case: Case) -> None:
    with accelerate(case.build(), ReuseConfig()) as trace:
        loaded = json.loads(trace.to_json())
    assert loaded["schedule"] is None and loaded["cutoff_block"] is None
    assert (loaded["steps"], loaded["seconds"], loaded["speedup_ideal"]) == ([], 0, 1.0)
    assert loaded["num_blocks"] == BLOCKS


def test_every_step_takes_time_and_the_sums_add_up(case: Case) -> None:
    trace = traced(case, ReuseConfig(2, 3, 0.3, 1.0))
    assert len(trace.steps) == STEPS
    assert all(step.seconds > 0 and step.seconds == step.spent_seconds for step in trace.steps)
    assert trace.seconds == trace.spent_seconds == pytest.approx(sum(step.seconds for step in trace.steps))


def test_the_steps_do_not_overlap_in_time(case: Case) -> None:
    pipe = case.build()
    start = time.perf_counter()
    with accelerate(pipe, ReuseConfig(2, 3, 0.3, 1.0)) as trace:
        case.run(pipe)
    assert trace.spent_seconds <= time.perf_counter() - start


def test_sums_and_speedups_of_a_trace_written_by_hand() -> None:
    baseline = Trace(4, steps=[stepped(3.0, 3.0), stepped(3.0, 3.0)])
    ours = Trace(4, steps=[stepped(3.0, 0.5), stepped(1.0, 1.0, blocks_evaluated=1)])
    assert (ours.seconds, ours.spent_seconds) == (4.0, 1.5)
    assert ours.speedup_over(baseline) == 1.5
    assert (ours.block_evaluations, ours.baseline_block_evaluations) == (5, 8)
    assert ours.speedup_ideal == 1.6


@pytest.mark.parametrize(("batch", "guided"), [(1, True), (3, True), (1, False), (2, False)])
def test_cache_bytes_are_one_hidden_state_of_the_whole_batch(case: Case, batch: int, guided: bool) -> None:
    trace = traced(case, ReuseConfig(3, 2, 0.2, 0.9), batch=batch, guided=guided)
    rows = 2 * batch if guided else batch
    assert trace.cache_bytes == rows * TOKENS * WIDTH * FLOAT_BYTES


@pytest.mark.parametrize(
    ("config", "steps", "note"),
    [
        (ReuseConfig(1), 10, "reuse_interval is 1"),
        (ReuseConfig(2, 3, 0.5, 0.5), 10, "The reuse window holds fewer than two steps"),
        (ReuseConfig(2, 3, 0.5, 0.6), 10, "The reuse window holds fewer than two steps"),
        (ReuseConfig(2, 3, 0.0, 1.0), 3, "3 steps are too few to reuse (at least 4 are needed)"),
    ],
)
def test_a_run_that_cannot_reuse_says_why(case: Case, config: ReuseConfig, steps: int, note: str) -> None:
    trace = traced(case, config, steps=steps)
    assert trace.note == f"{note}, so every step runs all blocks."
    assert json.loads(trace.to_json())["note"] == trace.note
    assert trace.kinds == "f" * steps
    assert (trace.cache_bytes, trace.speedup_ideal) == (0, 1.0)


@pytest.mark.parametrize("plan", [ReuseConfig(2, 3, 0.0, 1.0), Schedule.dense(4)])
def test_a_run_that_does_what_was_asked_needs_no_note(case: Case, plan: ReuseConfig | Schedule) -> None:
    assert traced(case, plan, steps=4).note is None


def test_the_next_run_starts_a_new_record(case: Case) -> None:
    pipe = case.build()
    with accelerate(pipe, ReuseConfig(2, 3, 0.0, 1.0)) as trace:
        case.run(pipe, batch=3)
        case.run(pipe, steps=3)
        assert (trace.kinds, trace.cache_bytes) == ("fff", 0)
        assert trace.note is not None
        case.run(pipe, steps=4)
    assert (trace.kinds, trace.note) == ("crcr", None)
    assert trace.cache_bytes == 2 * TOKENS * WIDTH * FLOAT_BYTES
    assert trace.block_evaluations == 2 * BLOCKS + 2 * (BLOCKS - 4)


@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("recorded", [False, True], ids=["accelerate", "record"])
def test_on_step_is_told_every_step_once_with_the_number_of_steps(case: Case, recorded: bool, steps: int) -> None:
    pipe, told = case.build(), list[tuple[int, int]]()

    def on_step(step: int, num_steps: int) -> None:
        told.append((step, num_steps))

    with record(pipe, on_step=on_step) if recorded else accelerate(pipe, ReuseConfig(), on_step=on_step):
        case.run(pipe, steps=steps)
    assert told == [(step, steps) for step in range(steps)]


def test_on_step_is_told_when_the_step_is_in_the_trace(case: Case) -> None:
    pipe, lengths = case.build(), list[int]()
    with accelerate(pipe, ReuseConfig(), on_step=lambda *_: lengths.append(len(trace.steps))) as trace:
        case.run(pipe)
    assert lengths == list(range(1, STEPS + 1))


def test_a_second_order_scheduler_has_one_record_and_one_call_of_on_step_per_step() -> None:
    pipe, told = pixart(), list[tuple[int, int]]()
    pipe.scheduler = HeunDiscreteScheduler()
    with accelerate(pipe, Schedule.parse("fffcrcrcrf", 3), on_step=lambda *place: told.append(place)) as trace:
        run_pixart(pipe)
    assert told == [(step, STEPS) for step in range(STEPS)]
    evaluations = [2] * (STEPS - 1) + [1]
    blocks = [BLOCKS - 4 if kind == "r" else BLOCKS for kind in "fffcrcrcrf"]
    assert [step.blocks_evaluated for step in trace.steps] == [a * b for a, b in zip(evaluations, blocks, strict=True)]
    assert [step.blocks_total for step in trace.steps] == [count * BLOCKS for count in evaluations]
    assert all(step.seconds > 0 for step in trace.steps)
