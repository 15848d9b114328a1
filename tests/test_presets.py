"""Other models on the command line: the paper's by name, any diffusers pipeline by its folder."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from PIL import Image

import app.page
from analysis.experiment import OWN, Request, SamplerError, default_sampler, run_baseline, with_sampler
from analysis.metrics import shift_tolerant_lpips
from blockdance import ReuseConfig, Schedule
from blockdance.__main__ import build_parser, main, settings
from blockdance.presets import FRAME_DECODER, PRESETS, T5
from tests.tiny import BLOCKS, dit
from tests.tiny_video import opensora
from tests.zoo import sd3_pipeline


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
    assert "demo, demo-styles, demo-video, dit-xl-2-256" in error and "got 'dit-xxl'" in error


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
    downloads = [PRESETS[model].repository, *([T5, FRAME_DECODER] if PRESETS[model].checkpoint else [])]
    assert all(f"`hf download {source}`" in error for source in downloads)


@pytest.fixture(scope="module")
def flowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline whose model was trained by flow matching."""
    folder = tmp_path_factory.mktemp("sd3")
    sd3_pipeline(size=32).save_pretrained(folder)
    return folder


def test_a_flow_matching_pipeline_keeps_its_own_scheduler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flowing: Path
) -> None:
    out, schedulers = tmp_path / "out", list[str]()

    def watched(pipe: Any, request: Request, *more: Any) -> Any:
        schedulers.append(type(with_sampler(pipe, request.sampler).scheduler).__name__)
        return run_baseline(pipe, request, *more)

    monkeypatch.setattr("blockdance.__main__.run_baseline", watched)
    run_here(monkeypatch, "red apple", "--model", str(flowing), "--steps", "4", "--out", str(out))
    result = json.loads((out / "result.json").read_text())
    assert (result["sampler"], result["schedule"]) == (OWN, "ffcr") and result["psnr"] is not None
    assert set(schedulers) == {"FlowMatchEulerDiscreteScheduler"}


def test_another_sampler_is_refused_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, flowing: Path
) -> None:
    out = tmp_path / "out"
    error = complaint(monkeypatch, capsys, "apple", "--model", str(flowing), "--sampler", "DDIM", "--out", str(out))
    assert "sampler must be own for StableDiffusion3Pipeline" in error and "got 'DDIM'" in error
    assert not out.exists()


def test_a_view_has_a_scheduler_of_its_own_whatever_the_sampler() -> None:
    for pipe, sampler in ((sd3_pipeline(), OWN), (dit(), OWN), (dit(), "Heun")):
        view = with_sampler(pipe, sampler)
        view.scheduler.set_timesteps(3)
        assert len(view.scheduler.timesteps) < len(pipe.scheduler.timesteps) == 1000
    with pytest.raises(SamplerError, match="sampler must be own"):
        with_sampler(sd3_pipeline(), "Heun")


def test_only_models_that_predict_noise_on_a_schedule_of_betas_get_ddim_by_default() -> None:
    pipe = dit()
    for scheduler, wanted in (
        (DDIMScheduler(prediction_type="v_prediction"), "DDIM"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), OWN),  # Wan's
    ):
        pipe.scheduler = scheduler
        assert default_sampler(pipe) == wanted


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"_class_name": "DiT', "model_index.json must be a JSON object with a _class_name"),
        ('["DiTPipeline"]', "model_index.json must be a JSON object with a _class_name"),
        ("{}", "model_index.json must be a JSON object with a _class_name"),
        ('{"_class_name": "NoSuchPipeline"}', "names 'NoSuchPipeline', a class that diffusers"),
        ('{"_class_name": "models"}', "names 'models', a class that diffusers"),
        ('{"_class_name": "DiTPipeline", "vae": "x"}', "cannot be loaded: "),
        ('{"_class_name": "DDIMScheduler"}', "cannot be loaded: "),
    ],
)
def test_a_folder_with_a_broken_index_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, index: str, words: str
) -> None:
    (tmp_path / "model_index.json").write_text(index)
    error = complaint(monkeypatch, capsys, "apple", "--model", str(tmp_path))
    assert words in error and str(tmp_path) in error


def test_a_folder_with_a_missing_part_is_called_incomplete_and_no_download_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    shutil.rmtree(folder / "vae")
    error = complaint(monkeypatch, capsys, "golden retriever", "--model", str(folder))
    assert f"the pipeline in {folder} is incomplete or broken: " in error and "hf download" not in error


def test_the_page_offers_only_models_that_draw_pictures() -> None:
    text = app.page.build_parser().format_help()
    assert "dit-xl-2-256" in text and "open-sora" not in text


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
