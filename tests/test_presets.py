"""Other models on the command line: the paper's by name, any diffusers pipeline by its folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.metrics import shift_tolerant_lpips
from blockdance import ReuseConfig, Schedule
from blockdance.__main__ import build_parser, main, settings
from blockdance.presets import PRESETS
from tests.tiny import BLOCKS, dit
from tests.tiny_video import opensora


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
    assert "demo, demo-video, dit-xl-2-256" in error and "got 'dit-xxl'" in error


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
    request, config = settings(parse(["a red apple falls", "--model", "open-sora-1.0-16x512x512"]))
    assert (request.steps, request.sampler, request.guidance) == (50, "DDIM", 7.0)
    assert config == ReuseConfig(2, 20, 0.25, 0.95)


@pytest.mark.parametrize("model", sorted(PRESETS))
def test_no_preset_hangs_where_there_is_no_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    """A hub that nobody can reach is asked once; the loaders are told not to ask it again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = complaint(monkeypatch, capsys, "goldfish", "--model", model)
    assert PRESETS[model].repository in error and "hf download" in error


def test_a_video_model_writes_a_video_and_names_its_worst_frame(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipe, out = opensora(size=32), tmp_path / "out"
    monkeypatch.setattr("blockdance.__main__.load_pipeline", lambda _: pipe)
    run_here(monkeypatch, "a red apple falls", "--model", "here", "--steps", "6", "--out", str(out))
    result = json.loads((out / "result.json").read_text())
    for name in ("baseline.gif", "blockdance.gif"):
        with Image.open(out / name) as video:
            assert getattr(video, "n_frames", 1) == 2
    assert result["lpips"] == pytest.approx(np.mean(result["lpips_of_frames"]))
    assert result["worst_frame"] == np.argmax(result["lpips_of_frames"])
    assert "worst frame" in capsys.readouterr().out
