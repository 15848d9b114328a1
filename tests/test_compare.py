"""The harness that sets BlockDance against what a user would pick instead."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from analysis.__main__ import main
from analysis.compare import COMPARE_RESULTS, PROMPTS, check_methods, compare, compare_one, draw_counted, read_prompts
from analysis.experiment import Request, with_sampler
from analysis.memory import peak_bytes
from analysis.metrics import shift_tolerant_lpips
from analysis.optional_rivals import check_installed, is_installed, smooth_schedule
from analysis.points import bootstrap, points, short
from analysis.records import BenchError, Record, read_records
from analysis.rivals import METHODS, Method
from analysis.tables_compare import (
    BEGIN,
    CURVES,
    END,
    best_at,
    compare_figure,
    render_compare,
    update_compare,
    verdicts,
    write_curves,
)
from blockdance import ReuseConfig, fixed_schedule, load_demo_pipeline
from blockdance.demo import DemoPipeline
from tests.tiny import quiet, vae

REQUEST = Request("octopus", steps=12)
SETTINGS = [("blockdance", "2,9,0.4"), ("fewer-steps", "15")]
KEYS = {
    "method", "knob", "prompt", "seed", "steps", "lpips", "ssim", "psnr", "seconds", "speedup_measured", "speedup_ideal",
    "block_evaluations", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> DemoPipeline:
    return with_sampler(load_demo_pipeline(), "DDIM")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_skips_work_repeats_itself_and_leaves_the_model_as_it_was(pipe: DemoPipeline, name: str) -> None:
    if not is_installed(METHODS[name].package):
        pytest.skip(f"{METHODS[name].package} is not installed: pip install -r analysis/requirements-rivals.txt")
    before = [(module, dict(vars(module))) for module in pipe.transformer.modules()]
    call = type(pipe).__call__
    check_methods(pipe, REQUEST, [name])
    assert [(module, vars(module)) for module in pipe.transformer.modules()] == before and type(pipe).__call__ is call
    assert not hasattr(pipe.transformer, "_cache_config")


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("blockdance-planned")])
def test_every_method_works_on_dit_too(name: str) -> None:
    if not is_installed(METHODS[name].package):
        pytest.skip(f"{METHODS[name].package} is not installed: pip install -r analysis/requirements-rivals.txt")
    check_methods(with_sampler(deep_dit(), "DDIM"), Request("goldfish", steps=20), [name])


def deep_dit() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=14, sample_size=8, patch_size=2
    )
    return quiet(DiTPipeline(transformer.eval(), vae().eval(), DDIMScheduler(), id2label={1: "goldfish"}))


@contextmanager
def noisy(pipe: Any, request: Request, knob: str) -> Any:
    hook = pipe.transformer.register_forward_hook(lambda _, __, out: (out[0] + torch.randn_like(out[0]),))
    yield
    hook.remove()


@contextmanager
def untidy(pipe: Any, request: Request, knob: str) -> Any:
    yield
    block = pipe.transformer.transformer_blocks[0]
    block.__class__ = type("Left", (type(block),), {})


@pytest.mark.parametrize(
    ("applied", "sentence"),
    [
        (lambda *_: nullcontext(), "wrong skips nothing at strong"),
        (noisy, "wrong draws another picture the second time"),
        (untidy, "wrong leaves the model changed"),
    ],
)
def test_a_method_that_does_not_work_is_found_out(monkeypatch: pytest.MonkeyPatch, applied: Any, sentence: str) -> None:
    fewer = (lambda request, _: request.steps) if "skips" in sentence else (lambda request, _: request.steps - 1)
    monkeypatch.setitem(METHODS, "wrong", Method("strength", ("strong",), applied, steps=fewer))
    with pytest.raises(BenchError, match=sentence):
        check_methods(with_sampler(load_demo_pipeline(), "DDIM"), REQUEST, ["wrong"])


def test_a_rival_that_is_not_installed_is_named_with_what_installs_it() -> None:
    with pytest.raises(BenchError, match=r"needs no_such_thing; `pip install -r analysis/requirements-rivals.txt` installs it"):
        check_installed("no_such_thing")


def test_smoothcache_reuses_while_the_change_since_the_last_computed_step_is_small() -> None:
    place = torch.tensor([0.0, 1.0, 1.1, 1.2, 1.9, 2.0, 2.1, 2.2, 2.3])
    errors = (place[:, None] - place).abs()
    assert smooth_schedule(errors, 0.15) == [1, 1, 0, 1, 1, 0, 1, 0, 1]
    assert smooth_schedule(errors, 9.0) == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert smooth_schedule(errors, 0.0) == [1] * 9


def test_the_peak_is_what_tensors_took_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000, 250)

    def together() -> list[torch.Tensor]:
        return [torch.ones(1000, 250) for _ in range(3)]

    assert 1e6 <= peak_bytes(one_after_the_other) < 2e6
    assert 3e6 <= peak_bytes(together) < 4e6


def test_two_processes_write_the_lines_of_one(tmp_path: Path) -> None:
    arguments = [
        "-m",
        "analysis",
        "compare",
        "--steps",
        "6",
        "--methods",
        "fewer-steps",
        "blockdance",
        "--prompts",
        "pizza",
        "owl",
        "robot",
    ]
    one = [sys.executable, *arguments, "--out", str(tmp_path / "one")]
    two = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *arguments,
        "--out",
        str(tmp_path / "two"),
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # sums of floats depend on the number of threads
    alone |= {"ACCELERATE_USE_CPU": "true"}  # without it accelerate sees one process on a CPU
    running = [subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in (one, two)]
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    lines = [[json.loads(text) for text in (tmp_path / name / "results.jsonl").open()] for name in ("one", "two")]
    measured = {"seconds", "baseline_seconds", "speedup_measured", "peak_bytes"}
    assert len(lines[0]) == 3 * sum(len(METHODS[name].sweep) for name in ("fewer-steps", "blockdance"))
    assert [{key: line[key] for key in line.keys() - measured} for line in lines[0]] == [
        {key: line[key] for key in line.keys() - measured} for line in lines[1]
    ]
    assert [line["peak_bytes"] for line in lines[0]] == pytest.approx([line["peak_bytes"] for line in lines[1]], rel=0.1)


def test_what_runs_is_what_is_counted(pipe: DemoPipeline) -> None:
    lines = compare_one(pipe, REQUEST, SETTINGS, shift_tolerant_lpips(), dict.fromkeys(SETTINGS, 0))
    schedule = fixed_schedule(ReuseConfig(2, 9, 0.4, 0.95), REQUEST.steps, 14)
    assert [line["block_evaluations"] for line in lines] == [schedule.block_evaluations(14), 6 * 14]
    assert [line["speedup_ideal"] for line in lines] == pytest.approx([schedule.ideal_speedup(14), 2.0])
    assert draw_counted(pipe, REQUEST)[1] == lines[1]["macs"] * 2


def test_a_comparison_writes_a_line_for_each_and_goes_on_where_it_was(pipe: DemoPipeline, tmp_path: Path) -> None:
    out, distance = tmp_path / "results.jsonl", shift_tolerant_lpips()
    requests = [Request(prompt, steps=8) for prompt in ("red apple", "pizza")]
    first = compare(pipe, requests[:1], ["fewer-steps"], distance, out)
    text = out.read_text()
    lines = compare(pipe, requests, ["fewer-steps", "first-block-cache"], distance, out)
    assert out.read_text().startswith(text) and lines[: len(first)] == first
    assert all(line.keys() >= KEYS for line in lines)
    expected = {(m, k, r.prompt) for m in ("fewer-steps", "first-block-cache") for k in METHODS[m].sweep for r in requests}
    assert len(lines) == len(expected) and {(line["method"], line["knob"], line["prompt"]) for line in lines} == expected
    assert compare(pipe, requests, ["fewer-steps", "first-block-cache"], distance, out) == lines
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


def test_the_prompts_are_64_that_the_model_knows(pipe: DemoPipeline) -> None:
    prompts = read_prompts(PROMPTS)
    assert len(set(prompts)) == len(prompts) == 64
    assert [word for prompt in prompts for word in pipe.unknown_words(prompt)] == []


def line(method: str, knob: str, prompt: str, lpips: float, seconds: float) -> Record:
    return {
        "bench": "compare", "method": method, "knob": knob, "prompt": prompt, "seed": 0, "steps": 30, "sampler": "DDIM",
        "guidance": 4.0, "lpips": lpips, "lpips_name": "LPIPS", "ssim": 1.0, "psnr": 40.0, "seconds": seconds,
        "baseline_seconds": 2.0, "speedup_ideal": 2.0, "peak_bytes": 100,
        "machine": {"cpu": "a CPU", "cores": 2, "torch_threads": 2},
    }  # fmt: skip


LINES = [
    line(method, knob, prompt, lpips * scale, seconds)
    for method, knob, lpips, seconds in (
        ("fewer-steps", "20", 0.010, 1.4),
        ("fewer-steps", "15", 0.030, 0.9),
        ("blockdance", "2,9,0.4", 0.004, 1.5),
        ("blockdance", "4,12,0.25", 0.020, 1.1),
        ("blockdance", "6,12,0.1", 0.015, 1.05),
    )
    for prompt, scale in (("a", 0.5), ("b", 1.5))
]


def test_a_point_is_the_mean_over_prompts_with_the_worst_and_an_interval() -> None:
    point = next(one for one in points(LINES) if one.knob == "2,9,0.4")
    assert (point.prompts, point.speedup) == (2, pytest.approx(2 / 1.5))
    assert (point.lpips, point.worst) == pytest.approx((0.004, 0.006))
    assert point.interval == pytest.approx((0.002, 0.006))


def test_the_interval_narrows_with_more_values_and_covers_the_mean() -> None:
    values = np.random.default_rng(1).exponential(size=400)
    few, many = bootstrap(values[:25]), bootstrap(values)
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert bootstrap(values) == many


def test_the_best_at_a_speed_is_the_least_change_among_those_that_are_fast_enough() -> None:
    found = points(LINES)
    best = best_at(found, "blockdance", 1.6)
    assert best is not None and best.knob == "6,12,0.1"
    slower = best_at(found, "blockdance", 1.25)
    assert slower is not None and slower.knob == "2,9,0.4"
    assert best_at(found, "blockdance", 2.0) is None


def test_the_table_says_who_wins_at_each_speed_also_where_it_is_a_rival() -> None:
    _, said, grid, others, metrics = render_compare(LINES, "compare.jsonl").split("\n\n")
    assert said.startswith("- 1.25x: blockdance (0.004") and said.count("\n- ") == 3
    head, _, *rows = grid.splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows}
    fewer, ours = (next(row for name, row in cells.items() if name.startswith(method)) for method in ("fewer", "blockdance"))
    assert head.count("at least") == 4
    assert ours[0].startswith("**0.004**") and "worst 0.006; 2,9,0.4 at 1.33x" in ours[0]
    assert fewer[1].startswith("**0.01**") and ours[1].startswith("0.015")
    assert ours[3].startswith("not reached") and fewer[3].startswith("**0.03**")
    assert "column of 1.6x" in others and "40.0 dB (40.0 to 40.0), worst 40.0" in metrics and metrics.count("\n") == 3
    same = [one | {"psnr": None} for one in LINES]
    assert "inf dB" in render_compare(same, "compare.jsonl"), "no picture differs, so none has a finite PSNR"


def test_the_verdict_names_who_leads_and_says_so_where_a_rival_wins() -> None:
    told = [str(one) for one in verdicts(points(LINES))]
    assert told[0] == (
        "1.25x: blockdance (0.004, worst 0.006) leads in the mean and at its worst; "
        "the best rival is fewer-steps (0.01, worst 0.015)."
    )
    assert told[1] == "1.4x: fewer-steps (0.01, worst 0.015) wins; blockdance (0.015, worst 0.022)."
    assert told[3] == "2x: only fewer-steps gets there."
    better_mean = [line("blockdance", "new", prompt, lpips, 0.9) for prompt, lpips in (("a", 0.0), ("b", 0.05))]
    assert "leads in the mean, not at its worst" in str(verdicts(points([*LINES, *better_mean]))[3])


def test_small_numbers_are_written_with_two_digits() -> None:
    assert [short(value) for value in (0.0000123, 0.4567, 0.0)] == ["0.000012", "0.46", "0"]


def test_the_page_gets_every_curve_and_verdict(tmp_path: Path) -> None:
    write_curves(tmp_path / "curves.json", [*LINES, *({**one, "steps": 50} for one in LINES)])
    told = json.loads((tmp_path / "curves.json").read_text())
    assert list(told["steps"]) == ["30", "50"] and told["prompts"] == 2
    curves = told["steps"]["50"]["curves"]
    assert [one["knob"] for one in curves["fewer-steps"]] == ["20", "15"] and curves["taylorseer"] == []
    assert len(told["steps"]["30"]["verdicts"]) == 4


def test_the_shipped_curves_are_those_of_the_results(tmp_path: Path) -> None:
    write_curves(tmp_path / "curves.json", read_records(COMPARE_RESULTS))
    assert (tmp_path / "curves.json").read_text() == CURVES.read_text()


def test_lines_of_different_machines_are_not_mixed() -> None:
    with pytest.raises(BenchError, match="differ in machine"):
        render_compare([LINES[0], LINES[1] | {"machine": {"cpu": "another", "cores": 2}}], "compare.jsonl")
    with pytest.raises(BenchError, match="holds no lines"):
        render_compare([], "compare.jsonl")


def test_the_readme_takes_the_table_and_the_figure_has_a_curve_for_each(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nAfter.\n")
    update_compare(readme, LINES, tmp_path / "compare.jsonl")
    assert "<details><summary>Every method, 30 steps</summary>\n\n| method" in readme.read_text()
    assert "[`compare.jsonl`](compare.jsonl)" in readme.read_text() and readme.read_text().endswith("After.\n")
    figure = compare_figure(LINES)
    assert [curve.name for curve in figure.data] == ["fewer-steps", "blockdance"]
    assert list(figure.data[1].x) == sorted(figure.data[1].x)
    assert figure.layout.yaxis.type == "log"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("analysis.__main__.perceptual_distance", shift_tolerant_lpips)
    monkeypatch.setattr(sys, "argv", ["analysis", "compare", *arguments])
    main()


def test_the_command_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(
        monkeypatch, "--prompts", "red apple", "octopus", "--methods", "fewer-steps", "blockdance", "--steps", "8",
        "--out", str(tmp_path / "here"),
    )  # fmt: skip
    lines = [json.loads(text) for text in (tmp_path / "here" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (len(METHODS["fewer-steps"].sweep) + len(METHODS["blockdance"].sweep))
    assert (tmp_path / "here" / "curves.html").exists()
    assert not shutil.which("chromium") or Image.open(tmp_path / "here" / "curves.png").size == (900, 640)
    assert "at least 1.25x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "methods must be among fewer-steps, blockdance"),
        (["--steps", "0"], "steps must be an integer in [1, 100], got 0"),
        (["--prompts", " "], "prompt must be a text that is not empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_command(monkeypatch, "--prompts", "red apple", "--out", str(tmp_path), *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and message in error
