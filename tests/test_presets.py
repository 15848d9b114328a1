"""Other models on the command line: the paper's by name, any diffusers pipeline by its folder."""

import json
import sys
from pathlib import Path

import pytest

from analysis.metrics import shift_tolerant_lpips
from blockdance import ReuseConfig, Schedule
from blockdance.__main__ import build_parser, main, settings
from blockdance.presets import PRESETS
from tests.tiny import BLOCKS, dit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipe = dit(size=64)
    pipe.register_to_config(id2label={"0": "tench", "1": "goldfish, Carassius auratus", "2": "golden retriever"})
    pipe.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("blockdance.__main__.perceptual_distance", shift_tolerant_lpips)
    monkeypatch.setattr(sys, "argv", ["blockdance", *arguments])
    main()


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, *arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_pipeline_in_a_folder_is_compared_like_the_model_in_the_box(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    out = tmp_path / "out"
    run_here(monkeypatch, "golden retriever", "--model", str(folder), "--steps", "6", "--out", str(out))
    result = json.loads((out / "result.json").read_text())
    schedule = Schedule.parse(result["schedule"], result["cutoff_block"])
    assert result["num_blocks"] == BLOCKS
    assert result["block_evaluations"] == schedule.block_evaluations(BLOCKS) < 6 * BLOCKS
    assert (out / "baseline.png").exists() and (out / "similarity.html").exists()


def test_a_class_that_is_not_known_is_answered_with_near_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    error = complaint(monkeypatch, capsys, "gold retriever", "--model", str(folder))
    assert "such as 'golden retriever'" in error and "got 'gold retriever'" in error


def test_an_unknown_model_is_answered_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = complaint(monkeypatch, capsys, "apple", "--model", "dit-xxl")
    assert "demo, dit-xl-2-256" in error and "got 'dit-xxl'" in error


def test_a_preset_out_of_reach_says_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.DiffusionPipeline.download", unreachable)
    error = complaint(monkeypatch, capsys, "goldfish", "--model", "dit-xl-2-256")
    assert "facebook/DiT-XL-2-256 is not on this machine" in error and "`hf download facebook/DiT-XL-2-256`" in error


def unreachable(*_: object, **__: object) -> None:
    raise OSError("cannot load: offline")


def test_a_preset_brings_the_papers_settings_and_options_overrule_them() -> None:
    parse = build_parser().parse_args
    request, config = settings(parse(["goldfish", "--model", "dit-xl-2-256"]))
    assert (request.steps, request.sampler) == (50, "DDIM")
    assert config == ReuseConfig(2, 20, 0.25, 0.95)
    request, config = settings(parse(["cat", "--model", "pixart-xl-2-1024", "--steps", "20", "--window-start", "0.5"]))
    assert (request.steps, request.sampler, request.guidance) == (20, "DPM-Solver++", 4.5)
    assert config == ReuseConfig(2, 20, 0.5, 0.95)
    assert len(PRESETS) == 5
