"""The command line: the files it writes agree with each other, and bad input gets one line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analysis.metrics import Picture, psnr, shift_tolerant_lpips, ssim
from blockdance import ReuseConfig, Schedule, fixed_schedule, load_demo_profile
from blockdance.__main__ import main
from blockdance.demo import MODEL_FOLDER
from blockdance.plan import Planner

ROOT = Path(__file__).resolve().parents[1]
TORCH_HOME = ROOT.parent / "shared" / "torch_home"
FILES = {"baseline.png", "blockdance.png", "similarity.html", "result.json"}
KEYS = {
    "prompt", "seed", "steps", "schedule", "num_blocks", "cutoff_block", "baseline_seconds", "seconds", "speedup_measured",
    "speedup_ideal", "block_evaluations", "baseline_block_evaluations", "lpips", "lpips_name", "ssim", "psnr", "cache_bytes",
}  # fmt: skip
OPTIONS = [
    "--model", "--steps", "--seed", "--guidance", "--sampler", "--reuse-interval", "--cutoff-block", "--window-start",
    "--window-end", "--target-speedup", "--storage", "--style", "--out",
]  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A command that ran."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    def picture(self, name: str) -> Picture:
        return np.asarray(Image.open(self.folder / name))


def depth() -> int:
    return json.loads((MODEL_FOLDER / "transformer" / "config.json").read_text())["num_layers"]


def fastest() -> float:
    return np.floor(100 * Planner(load_demo_profile(), 30).fastest) / 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run in a process of its own, whose only proxy is a closed port: no network is reached or waited for."""
    folder = tmp_path_factory.mktemp("cli") / "new" / "folder"
    environment = os.environ | {"https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    if TORCH_HOME.exists():
        environment["TORCH_HOME"] = str(TORCH_HOME)
    command = [sys.executable, "-m", "blockdance", "red zyxgrblt apple", "--steps", "6", "--seed", "3", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return Finished(folder, done.returncode, done.stdout, done.stderr)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command in this process, with the difference that needs no network."""
    monkeypatch.setattr("blockdance.__main__.perceptual_distance", shift_tolerant_lpips)
    monkeypatch.setattr(sys, "argv", ["blockdance", *arguments])
    main()


def test_a_run_writes_its_four_files_and_nothing_else(finished: Finished) -> None:
    assert finished.code == 0, finished.stderr
    assert {file.name for file in finished.folder.iterdir()} == FILES


def test_the_result_has_every_figure_and_they_agree(finished: Finished) -> None:
    result = finished.result
    assert set(result) >= KEYS
    assert (result["prompt"], result["seed"], result["steps"]) == ("red zyxgrblt apple", 3, 6)
    schedule = Schedule.parse(result["schedule"], result["cutoff_block"])
    assert schedule == fixed_schedule(ReuseConfig(), 6, depth())
    assert result["num_blocks"] == depth()
    assert result["block_evaluations"] == schedule.block_evaluations(depth())
    assert result["baseline_block_evaluations"] == 6 * depth()
    assert result["speedup_ideal"] == pytest.approx(schedule.ideal_speedup(depth()))
    assert result["speedup_measured"] == pytest.approx(result["baseline_seconds"] / result["seconds"])
    assert result["cache_bytes"] > 0
    assert result["lpips"] > 0 and "LPIPS" in result["lpips_name"]


def test_the_pictures_differ_by_what_the_result_says(finished: Finished) -> None:
    baseline, ours = finished.picture("baseline.png"), finished.picture("blockdance.png")
    assert baseline.shape == ours.shape == (64, 64, 3)
    assert finished.result["ssim"] == pytest.approx(ssim(baseline, ours)) != 1
    assert finished.result["psnr"] == pytest.approx(psnr(baseline, ours))


def test_the_similarity_map_opens_without_a_network(finished: Finished) -> None:
    page = (finished.folder / "similarity.html").read_text()
    assert "Plotly.newPlot" in page and "reused from step" in page
    assert "<script src=" not in page and 'src="http' not in page


def test_the_table_tells_the_figures_and_unknown_words_are_noted(finished: Finished) -> None:
    result = finished.result
    assert "note: the model does not know the word 'zyxgrblt'\n" in finished.stdout
    assert f"{result['block_evaluations']} of {result['baseline_block_evaluations']}" in finished.stdout
    assert f"SSIM {result['ssim']:.4f}, PSNR {result['psnr']:.1f} dB" in finished.stdout
    assert result["schedule"] in finished.stdout and str(finished.folder) in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["--steps", "1"], "note: 1 steps are too few to reuse"),
        (["--steps", "4", "--reuse-interval", "1"], "note: reuse_interval is 1"),
        (["--steps", "4", "--window-start", "0.5", "--window-end", "0.5"], "note: The reuse window holds fewer than two steps"),
    ],
)
def test_a_run_without_reuse_says_why_and_equals_the_baseline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], note: str
) -> None:
    run_here(monkeypatch, "red apple", *arguments, "--out", str(tmp_path))
    done = Finished(tmp_path, 0, *capsys.readouterr())
    assert note in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert np.array_equal(done.picture("baseline.png"), done.picture("blockdance.png"))
    assert (done.result["lpips"], done.result["ssim"], done.result["psnr"]) == (0, 1, None)
    assert "PSNR infinite" in done.stdout
    assert done.result["speedup_ideal"] == 1 and set(done.result["schedule"]) == {"f"}


def test_the_planner_may_choose_the_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--steps", "16", "--target-speedup", "1.5", "--storage", "extrapolated"]
    run_here(monkeypatch, "red apple", *options, "--out", str(tmp_path))
    done = Finished(tmp_path, 0, *capsys.readouterr())
    result = done.result
    assert f"planned             {result['schedule']}, " in done.stdout
    assert result["speedup_ideal"] >= 1.5 and result["storage"] == "extrapolated"
    schedule = Schedule.parse(result["schedule"], result["cutoff_block"])
    assert len(schedule) == 16 and schedule != fixed_schedule(ReuseConfig(), 16, depth())


def test_a_style_is_chosen_beside_the_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = ["--model", "demo-styles", "--steps", "4", "--out"]
    run_here(monkeypatch, "octopus", "--style", "noto", *common, str(tmp_path / "option"))
    run_here(monkeypatch, "noto octopus", *common, str(tmp_path / "word"))
    assert (tmp_path / "option" / "baseline.png").read_bytes() == (tmp_path / "word" / "baseline.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["apple", "--steps", "0"], "steps must be an integer in [1, 100], got 0"),
        (["apple", "--steps", "101"], "steps must be an integer in [1, 100], got 101"),
        (["apple", "--seed", "-1"], "seed must be an integer in [0, 4294967295], got -1"),
        (["apple", "--guidance", "0.5"], "guidance must be a number in [1, 20], got 0.5"),
        (["apple", "--guidance", "nan"], "guidance must be a number in [1, 20], got nan"),
        (["apple", "--sampler", "Euler"], "sampler must be one of DDIM, DPM-Solver++, Heun, own, got 'Euler'"),
        (["apple", "--storage", "psychic"], "storage must be one of latest, extrapolated, got 'psychic'"),
        (
            ["apple", "--target-speedup", "nan"],
            f"target_speedup must be above 1 and at most {fastest():.2f} with this model and steps, got nan",
        ),
        (
            ["apple", "--target-speedup", "1.3", "--steps", "4"],
            "nothing can be reused in 4 steps with this model; take more steps for a target_speedup, got 1.3",
        ),
        (
            ["apple", "--target-speedup", "1.3", "--reuse-interval", "2", "--window-end", "0.9"],
            "--target-speedup has the planner choose the whole schedule; leave out --reuse-interval, --window-end",
        ),
        (
            ["apple", "--target-speedup", "1.3", "--cutoff-block", "9"],
            "--target-speedup has the planner choose the whole schedule; leave out --cutoff-block",
        ),
        (["apple", "--target-speedup", "2", "--steps", "3"], "steps must be at least 4 to reuse anything, got 3"),
        (
            ["dog", "--model", "dit-xl-2-256", "--target-speedup", "2"],
            "--target-speedup needs --model demo, as it alone ships with a profile, got 'dit-xl-2-256'",
        ),
        (["apple", "--style", "noto"], "style must be left out with a model of one style, got 'noto'"),
        (
            ["apple", "--model", "demo-styles", "--style", "oil"],
            "style must be one of fluent, noto, twemoji, got 'oil'",
        ),
        (["  "], "prompt must be a text that is not empty, got '  '"),
        (["apple", "--reuse-interval", "0"], "reuse_interval must be an integer of at least 1, got 0"),
        (["apple", "--cutoff-block", "-1"], "cutoff_block must be None or an integer of at least 0, got -1"),
        (
            ["apple", "--cutoff-block", str(depth() - 1)],
            f"cutoff_block must be in [0, {depth() - 2}] for {depth()} blocks, got {depth() - 1}",
        ),
        (["apple", "--window-start", "1.5"], "window_start must be a fraction in [0, 1], got 1.5"),
        (["apple", "--window-end", "-0.1"], "window_end must be a fraction in [0, 1], got -0.1"),
        (
            ["apple", "--window-start", "0.9", "--window-end", "0.2"],
            "window_start must not exceed window_end, got 0.9 > 0.2",
        ),
    ],
)
def test_a_bad_value_gets_one_line_that_names_it_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, *arguments, "--out", str(out))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: {words}\n"
    assert not out.exists()


@pytest.mark.parametrize("below", ["", "folder"])
def test_an_out_path_that_cannot_be_a_folder_gets_one_line_and_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, below: str
) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, "apple", "--steps", "4", "--out", str(file / below))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and str(file) in error and error.count("\n") == 1
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: prompt"),
        (["apple", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["apple", "--sharpness", "3"], "unrecognized arguments: --sharpness 3"),
    ],
)
def test_arguments_that_cannot_be_read_end_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def test_help_lists_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, "--help")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  -")}
    assert exit_info.value.code == 0
    assert listed == {"-h,", *OPTIONS}
