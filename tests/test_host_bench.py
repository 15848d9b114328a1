"""The host's bench: loops of one kind of step around blocks that do nothing, and what follows from their seconds. No timing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from analysis import host, tables_host
from analysis.bench import run_bench
from analysis.host import CALLS, DEEP, KINDS, LOOP_STEPS, LOOPS, SHALLOW, IdlePipeline, host_line, loop_seconds, measure_host
from analysis.records import Record, read_records, write_records
from analysis.tables import render
from blockdance import Schedule, accelerate
from tests.test_bench import OTHERS, SPEEDUP

PER_STEP = {"plain": 10.0, "full": 12.0, "full, where others reuse": 15.0, "alternating": 30.0, "reuse": 20.0}
PER_BLOCK = {"plain": 0.5, "full": 0.5, "full, where others reuse": 1.0, "alternating": 3.0, "reuse": 2.0}
"""Microseconds that a kind of step takes apart from its blocks, and for each call of a block; all-cache takes 40 and 4."""


def made_up(*rounds: float) -> dict[tuple[str, int], list[float]]:
    """Seconds of all loops if steps took exactly the above, times a factor for every round."""
    return {
        (name, blocks): [
            factor * LOOP_STEPS * (PER_STEP[name] + CALLS * blocks * PER_BLOCK[name]) / 1e6 for factor in rounds
        ]
        for name in LOOPS
        for blocks, _ in (DEEP, SHALLOW)
    }  # fmt: skip


@pytest.fixture(scope="module")
def lines() -> list[Record]:
    origin = {name: OTHERS[0][name] for name in ("commit", "date", "machine", "versions")}
    return [{"bench": "host"} | host_line(kind, made_up(1.0, 2.0, 3.0)) | origin for kind in KINDS]


def test_the_loop_is_guidance_in_two_calls_of_blocks_that_put_out_what_they_are_given() -> None:
    pipe, entered = IdlePipeline(5), [0] * 5
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: entered.__setitem__(index, entered[index] + 1))
    assert torch.equal(pipe(6), pipe.latent)
    assert entered == [2 * 6] * 5


@pytest.mark.parametrize("num_blocks", [DEEP, SHALLOW], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", [name for name in LOOPS if name != "plain"])
def test_inside_accelerate_every_step_is_of_the_kind_that_its_loop_is_for(name: str, num_blocks: tuple[int, int]) -> None:
    depth, cutoff = num_blocks
    pipe, schedule = IdlePipeline(depth), Schedule.parse(LOOPS[name], cutoff)
    with accelerate(pipe, schedule) as trace:
        pipe(LOOP_STEPS)
    assert (len(trace.steps), trace.kinds) == (LOOP_STEPS, LOOPS[name])
    assert trace.block_evaluations == CALLS * schedule.block_evaluations(depth)


def test_both_depths_skip_the_same_share_so_that_the_difference_is_of_blocks_alone() -> None:
    assert (DEEP[1] + 1) / DEEP[0] == (SHALLOW[1] + 1) / SHALLOW[0]


def test_one_loop_is_timed_after_one_that_is_not_and_the_pipeline_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, entered, timed = IdlePipeline(4), [], []
    pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(lambda *_: entered.append(1))

    def watching(run: Any) -> float:
        before = len(entered)
        run()
        timed.append((before, len(entered)))
        return 1.0

    monkeypatch.setattr(host, "seconds_of", watching)
    assert loop_seconds(pipe, LOOPS["reuse"], 2) == 1.0
    loop = CALLS * LOOP_STEPS
    assert timed == [(loop, 2 * loop)] and len(entered) == 2 * loop
    assert type(pipe.transformer) is host.PixArtTransformer2DModel and type(pipe.scheduler) is host.IdleScheduler


@pytest.mark.parametrize(
    ("kind", "step", "block"),
    [("plain", 10, 0.5), ("full", 12, 0.5), ("full, where others reuse", 15, 1), ("cache", 40, 4), ("reuse", 20, 2)],
)
def test_what_a_step_and_a_block_take_follows_from_two_depths(kind: str, step: float, block: float) -> None:
    """In the middle round; the outer ones are half and one and a half of it."""
    line, calls = host_line(kind, made_up(0.5, 1.0, 1.5)), CALLS * DEEP[0]
    for name, value in (("outside", step), ("block", block), ("step", step + calls * block)):
        assert line[f"{name}_microseconds"] == pytest.approx(value)
        assert line[f"{name}_microseconds_quartiles"] == pytest.approx([0.75 * value, 1.25 * value])
        beyond = value - {"outside": 10, "block": 0.5, "step": 10 + calls * 0.5}[name]
        assert line.get(f"beyond_{name}_microseconds", 0) == pytest.approx(beyond, abs=1e-9)
    assert any(name.startswith("beyond_") for name in line) == (kind != "plain")


def test_a_line_for_each_kind_of_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ROUNDS", 1)
    found = measure_host(2)
    assert [line["kind"] for line in found] == list(KINDS)
    for line in found:
        low, high = line["step_microseconds_quartiles"]
        assert (line["num_blocks"], line["cutoff_block"], line["calls_per_step"], line["repeats"]) == (*DEEP, 2, 2)
        assert line["schedule"] == KINDS[line["kind"]] and low <= line["step_microseconds"] <= high


def test_the_bench_writes_them_beside_the_others_and_says_nothing_of_the_model_in_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ROUNDS", 1)
    out = tmp_path / "bench.jsonl"
    write_records(out, [SPEEDUP])
    found = run_bench(["host"], 1, out)
    assert read_records(out) == [SPEEDUP, *found]
    assert all(line["bench"] == "host" and line["machine"] and "model" not in line and "prompt" not in line for line in found)


def test_the_table_names_the_hardware_and_has_a_row_for_each_kind(lines: list[Record]) -> None:
    sentence, table = render(lines, "bench.jsonl").split("\n\n")
    assert "on A processor, " in sentence and "`abc1234`" in sentence and "3 interleaved loops" in sentence
    head, _, *rows = table.splitlines()
    assert len(rows) == len(KINDS) and {row.count(" | ") for row in (head, *rows)} == {len(tables_host.HEAD) - 1}
    assert (
        "| reuse | 264.00 (198.00 to 330.00) | 188.00 (141.00 to 235.00) | 20.00 (15.00 to 25.00) | 3.00 (2.25 to 3.75) |"
        in rows
    )


def test_it_stands_below_the_others_also_if_another_machine_measured_it(lines: list[Record]) -> None:
    elsewhere = [line | {"machine": {"cpu": "Another processor", "cores": 1, "torch_threads": 1}} for line in lines]
    without, text = render([SPEEDUP, *OTHERS], "bench.jsonl"), render([SPEEDUP, *OTHERS, *elsewhere], "bench.jsonl")
    assert text.startswith(without + "\n\n") and "on Another processor, " in text[len(without) :]
