"""The bench at full size: the architectures are the published ones, and the code path runs on a tiny one."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch._dynamo.testing import CompileCounter

from analysis import full_size
from analysis.__main__ import main
from analysis.architectures import ARCHITECTURES, Architecture, sampler_for, with_random_weights
from analysis.full_size import FORWARDS, WHOLE, Job, ideal_with_outside, key_of, run_full_size
from analysis.records import BenchError, Record, read_records, write_records
from analysis.tables_full_size import BEGIN, END, render_full_size, update_full_size
from blockdance import BlockDanceError
from blockdance.models.stdit import STDiT
from blockdance.presets import PRESETS
from blockdance.scheduled import depth_of
from tests.tiny import BLOCKS, dit

DIT, VIDEO = "dit-xl-2-512", "open-sora-1.0-16x512x512"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DiT and an STDiT of a few thousand parameters under the names of the large ones."""
    whole = ARCHITECTURES[DIT]
    small_dit = Architecture(lambda: dit().transformer, (4, 8, 8), whole.conditions, whole.paper_speedup)
    monkeypatch.setitem(ARCHITECTURES, DIT, small_dit)
    build = partial(STDiT, input_size=(2, 8, 8), hidden_size=16, depth=4, num_heads=2)
    monkeypatch.setitem(ARCHITECTURES, VIDEO, Architecture(build, (4, 2, 8, 8), ARCHITECTURES[VIDEO].conditions, 1.348))


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["analysis", "bench", *arguments])
    main()


@pytest.mark.parametrize(("name", "millions"), [("dit-xl-2-256", 750), ("pixart-xl-2-1024", 611), (VIDEO, 760)])
def test_the_architectures_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    """diffusers' DiT has a timestep and label embedding in each of the 28 blocks, 75 million more than the paper's 675."""
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_takes_its_conditions(name: str) -> None:
    """On the meta device, where shapes are checked and nothing is computed."""
    architecture = ARCHITECTURES[name]
    with torch.device("meta"), torch.no_grad():
        model = architecture.build()
        out = model(torch.empty(2, *architecture.latent), timestep=torch.empty(2), **architecture.conditions(2))
    sample = out if isinstance(out, torch.Tensor) else out.sample
    assert sample.shape == (2, 8, *architecture.latent[1:])


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("interval", [2, 3])
def test_half_of_the_steps_have_the_same_ideal_to_a_hundredth(name: str, interval: int) -> None:
    half = PRESETS[name].steps // 2
    ideals = [Job(name, steps=steps).schedule(interval, 28).ideal_speedup(28) for steps in (None, half)]
    assert ideals[0] == pytest.approx(ideals[1], abs=0.03)


def test_every_preset_can_be_measured() -> None:
    assert ARCHITECTURES.keys() == PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "interval", "low", "high"),
    [
        ("dit-xl-2-512", 2, 1.36, 1.38),
        ("dit-xl-2-512", 3, 1.54, 1.58),
        ("pixart-xl-2-1024", 2, 1.24, 1.27),
        (VIDEO, 2, 1.36, 1.38),
    ],
)
def test_the_ideal_is_the_cost_models_at_the_papers_settings(name: str, interval: int, low: float, high: float) -> None:
    schedule = Job(name).schedule(interval, 28)
    assert (len(schedule), schedule.cutoff_block) == (PRESETS[name].steps, 20)
    assert low < schedule.ideal_speedup(28) < high


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [DIT, VIDEO])
def test_a_record_holds_what_the_table_needs(name: str, tmp_path: Path) -> None:
    records = run_full_size(Job(name, (1, 2), (2, 3), steps=8, repeats=2, dtype="bfloat16"), tmp_path / "full.jsonl")
    assert [(record["batch"], record["reuse_interval"]) for record in records] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    for record in records:
        depth = record["num_blocks"]
        schedule = Job(name, steps=8).schedule(record["reuse_interval"], depth)
        assert record["schedule"] == str(schedule)
        assert record["baseline_block_evaluations"] == 8 * depth
        assert record["block_evaluations"] == schedule.block_evaluations(depth)
        assert record["speedup_ideal"] == pytest.approx(schedule.ideal_speedup(depth))
        low, high = record["speedup_measured_quartiles"]
        assert low <= record["speedup_measured"] <= high
        assert record["fraction_of_ideal"] == pytest.approx(record["speedup_measured"] / record["speedup_ideal"])
        assert record["outside_fraction"] == pytest.approx(record["outside_seconds"] / record["baseline_seconds"])
        share = record["block_evaluations"] / record["baseline_block_evaluations"]
        reachable = ideal_with_outside(share, record["outside_fraction"])
        assert record["speedup_ideal_with_outside"] == pytest.approx(reachable)
        assert record["fraction_of_ideal_with_outside"] == pytest.approx(record["speedup_measured"] / reachable)
        assert record["paper_speedup"] == (ARCHITECTURES[name].paper_speedup if record["reuse_interval"] == 2 else None)
        assert record["cache_bytes"] == record["batch"] * 2 * 16 * {DIT: 16, VIDEO: 2 * 16}[name] * 2
        assert record["dtype"] == "bfloat16" and record["commit"] is not None
    text = render_full_size(records, "full.jsonl")
    assert (
        "8 (reduced from 50)" in text
        and f"{ARCHITECTURES[name].paper_speedup}x" in text
        and "bfloat16, torch" in text
        and ", eager |" in text
    )


@pytest.mark.usefixtures("tiny")
def test_what_the_file_has_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, measured = tmp_path / "full.jsonl", []
    whole = full_size.measure

    def counting(job: Job, sampler: Any, batch: int, intervals: list[int]) -> list[Record]:
        measured.append((batch, intervals))
        return whole(job, sampler, batch, intervals)

    monkeypatch.setattr(full_size, "measure", counting)
    run_full_size(Job(DIT, (1,), (2,), 6, 1), out)
    first = out.read_text()
    records = run_full_size(Job(DIT, (1, 2), (2, 3), 6, 1), out)
    assert measured == [(1, [2]), (1, [3]), (2, [2, 3])]
    assert out.read_text().startswith(first)
    assert run_full_size(Job(DIT, (1, 2), (2, 3), 6, 1), out) == records and len(measured) == 3
    run_full_size(Job(DIT, (1,), (2,), 6, 1, dtype="float16"), out)
    assert len(measured) == 4
    assert len(out.read_text().splitlines()) == 5


@pytest.mark.usefixtures("tiny")
def test_what_another_commit_measured_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "full.jsonl"
    old = run_full_size(Job(DIT, (1, 2), (2,), 6, 1), out)
    write_records(out, [record | {"commit": "0000000"} for record in old])
    commits = [(record["batch"], record["commit"]) for record in run_full_size(Job(DIT, (1,), (2,), 6, 1), out)]
    assert commits == [(2, "0000000"), (1, old[0]["commit"])]


@pytest.mark.usefixtures("tiny")
def test_what_is_asked_for_twice_is_measured_once(tmp_path: Path) -> None:
    assert len(run_full_size(Job(DIT, (1, 1), (2, 2), 6, 1), tmp_path / "full.jsonl")) == 1


@pytest.mark.usefixtures("tiny")
def test_a_batch_that_does_not_fit_is_named_and_the_smaller_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "full.jsonl", full_size.measure

    def small_gpu(job: Job, sampler: Any, batch: int, intervals: list[int]) -> list[Record]:
        if batch > 1:
            raise torch.OutOfMemoryError
        return whole(job, sampler, batch, intervals)

    monkeypatch.setattr(full_size, "measure", small_gpu)
    with pytest.raises(BenchError, match=f"batch must fit in the GPU's memory, which {DIT} with 16 does not"):
        run_full_size(Job(DIT, (1, 16), (2,), 6, 1), out)
    assert [record["batch"] for record in read_records(out)] == [1]


def test_the_dtype_is_the_devices_own_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        monkeypatch.setattr(full_size, "device_here", partial(torch.device, device))
        assert Job(DIT).run_dtype == dtype
        assert Job(DIT, dtype="float16").run_dtype == "float16"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [DIT, VIDEO])
@pytest.mark.parametrize("compiled", [False, True])
def test_outside_the_blocks_no_block_runs_and_all_come_back(name: str, compiled: bool) -> None:
    model = with_random_weights(ARCHITECTURES[name].build, torch.device("cpu"), torch.float32)
    sampler, blocks = sampler_for(name, model, 1), list(full_size.blocks_of(model))
    classes, entered = [type(block) for block in blocks], []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: entered.append(1))
        if compiled:
            block.compile(backend="eager")
    full_size.outside(sampler, 5)
    assert not entered
    sampler(5)
    assert len(entered) == 5 * len(blocks)
    with pytest.raises(RuntimeError), full_size.without_blocks(model):
        raise RuntimeError
    assert [type(block) for block in full_size.blocks_of(model)] == classes


@pytest.mark.parametrize(
    ("evaluated", "outside", "speedup"), [(0.5, 0.0, 2.0), (0.5, 1.0, 1.0), (0.5, 0.2, 1 / 0.6), (1.0, 0.3, 1.0)]
)
def test_what_is_outside_the_blocks_is_not_saved(evaluated: float, outside: float, speedup: float) -> None:
    assert ideal_with_outside(evaluated, outside) == pytest.approx(speedup)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("forward", [name for name in FORWARDS if name != "eager"])
def test_compiled_transformers_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: str) -> None:
    """Really traced, blocks each into one graph: what breaks a graph, or needs more graphs than dynamo keeps, is an error."""
    graphs, whole = CompileCounter(), torch.nn.Module.compile
    told: list[bool] = []

    def traced(module: torch.nn.Module, **how: Any) -> None:
        told.append(isinstance(module, BasicTransformerBlock))
        whole(module, **{"backend": graphs} | how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    assert WHOLE["graphs"] == {"mode": "reduce-overhead"}
    monkeypatch.setattr(full_size, "WHOLE", {key: {"backend": graphs} for key in WHOLE})
    records = run_full_size(Job(DIT, (1, 2, 3), (1, 2), 6, 1, forward=forward), tmp_path / "full.jsonl")
    assert graphs.frame_count > 0
    assert told == ([True] * BLOCKS if forward == "blocks" else [False])
    assert {record["forward"] for record in records} == {forward}
    assert f", {FORWARDS[forward]} |" in render_full_size(records, "full.jsonl")


def test_an_earlier_line_that_says_whether_blocks_were_compiled_is_known_again() -> None:
    """So that the measurement made today replaces it, and a table says how it ran."""
    now: Record = {"architecture": DIT, "batch": 1, "reuse_interval": 2, "steps": 50, "dtype": "bfloat16", "device": "cuda"}
    for forward, compiled in (("eager", False), ("blocks", True)):
        assert key_of(now | {"compiled": compiled}) == key_of(now | {"forward": forward})


def test_random_weights_are_small_and_finite_and_take_no_gradient() -> None:
    model = with_random_weights(lambda: dit().transformer, torch.device("cpu"), torch.bfloat16)
    weights = [*model.parameters(), *model.buffers()]
    assert all(weight.isfinite().all() and not weight.requires_grad for weight in weights)
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert torch.cat([weight.flatten() for weight in weights]).float().std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.usefixtures("tiny")
def test_the_loop_is_sampling_with_guidance() -> None:
    model = with_random_weights(ARCHITECTURES[DIT].build, torch.device("cpu"), torch.float32)
    sampler = sampler_for(DIT, model, 3)
    assert depth_of(sampler) == BLOCKS
    latent = sampler(5)
    assert latent.shape == (3, 4, 8, 8) and latent.isfinite().all()
    assert torch.equal(latent, sampler(5))
    sampler.guidance = 1.0
    assert not torch.equal(latent, sampler(5))


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_lines_and_the_readme_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, readme = tmp_path / "full.jsonl", tmp_path / "README.md"
    run_command(
        monkeypatch, "--model", DIT, "--random-weights", "--batch", "1", "--intervals", "2", "--steps", "6",
        "--repeats", "1", "--out", str(out),
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert DIT in shown and str(out) in shown
    readme.write_text(f"# Title\n\n{BEGIN}\nstale\n{END}\n\nAfter.\n")
    update_full_size(readme, [json.loads(line) for line in out.read_text().splitlines()], out)
    page = readme.read_text()
    assert page.startswith(f"# Title\n\n{BEGIN}\n") and page.endswith(f"{END}\n\nAfter.\n")
    assert "stale" not in page and "[`full.jsonl`](full.jsonl)" in page and "| 1.374x |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", DIT], "--model needs --random-weights"),
        (["--random-weights"], "--random-weights needs --model, one of dit-xl-2-256"),
        (["--model", "unet", "--random-weights"], "model must be one of dit-xl-2-256"),
        (["--model", DIT, "--random-weights", "--batch", "0"], "batch must be an integer in [1, 64], got 0"),
        (["--model", DIT, "--random-weights", "--intervals", "0"], "intervals must be an integer in [1, 100], got 0"),
        (["--model", DIT, "--random-weights", "--steps", "3"], "steps must be an integer in [4, 100], got 3"),
        (
            ["--model", DIT, "--random-weights", "--forward", "backward"],
            "forward must be one of eager, blocks, whole, graphs, got 'backward'",
        ),
        (["--model", DIT, "--random-weights", "--repeats", "0"], "repeats must be an integer in [1, 1000], got 0"),
        (
            ["--model", DIT, "--random-weights", "--dtype", "int8"],
            "dtype must be one of float32, bfloat16, float16, got 'int8'",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_command(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_file_without_records_is_refused() -> None:
    with pytest.raises(BenchError, match="holds no records; `python -m analysis bench --model NAME --random-weights` writes"):
        render_full_size([], "full.jsonl")
    assert issubclass(BenchError, BlockDanceError)
