"""The evaluation of the models in the box: retrieval counts what it says, and the embedding is LPIPS."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis.metrics import lpips_squeeze, squeezenet_file
from analysis.records import ROOT
from assets.recipe.data import Pack
from assets.recipe.evaluation import (
    RESULTS,
    Embedding,
    EvaluationError,
    check_compositions,
    chosen_captions,
    evaluate_clips,
    evaluate_pictures,
    main,
    squared_distances,
)
from assets.recipe.sheet import CAPTIONS, CLIPS, COMPOSITIONS, clip_sheet, labelled_sheet
from blockdance import load_demo_pipeline, load_demo_video_pipeline
from tests.test_metrics import BACKBONE


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    """In place of the embedding: the pixels themselves."""
    return pictures.flatten(1)


def training_set(shape: tuple[int, ...]) -> Pack:
    pictures = np.random.default_rng(0).integers(0, 256, size=(6, *shape), dtype=np.uint8)
    return Pack(pictures, [[f"name {k}"] for k in range(6)])


class Copier:
    """Draws the training picture of each prompt, or of another one."""

    def __init__(self, pack: Pack, shift: int = 0) -> None:
        self.known = {group[0]: pack.pictures[(k + shift) % len(pack.captions)] / 255 for k, group in enumerate(pack.captions)}

    def __call__(self, prompts: list[str], **_: Any) -> tuple[np.ndarray]:
        return (np.stack([self.known[prompt] for prompt in prompts]).astype(np.float32),)


def test_a_model_that_copies_is_told_by_a_nearest_distance_of_zero() -> None:
    pack = training_set((8, 8, 3))
    found = evaluate_pictures(Copier(pack), pack, pixels)  # type: ignore[arg-type]
    assert found["top1_retrieval"] == 1 and found["missed"] == {}
    assert found["mean_nearest_distance"] == pytest.approx(0, abs=1e-3)
    assert found["mean_nearest_distance_among_training_pictures"] > 1


def test_a_model_that_draws_other_subjects_retrieves_none() -> None:
    pack = training_set((8, 8, 3))
    found = evaluate_pictures(Copier(pack, shift=1), pack, pixels)  # type: ignore[arg-type]
    assert found["top1_retrieval"] == 0 and found["missed"]["name 0"] == "name 1"


def test_clips_are_retrieved_by_all_their_frames() -> None:
    pack = training_set((4, 8, 8, 3))
    found = evaluate_clips(Copier(pack), pack, pixels)  # type: ignore[arg-type]
    assert found["top1_retrieval"] == 1 and found["motion"] == pytest.approx(found["motion_of_training_clips"], rel=0.01)
    assert evaluate_clips(Copier(pack, shift=1), pack, pixels)["top1_retrieval"] == 0  # type: ignore[arg-type]


def test_squared_distances_in_the_embedding_are_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = BACKBONE if BACKBONE.exists() else squeezenet_file()
    if backbone is None:
        pytest.skip("the SqueezeNet backbone is neither beside this checkout, nor cached, nor within reach")
    monkeypatch.setattr("assets.recipe.evaluation.squeezenet_file", lambda: backbone)
    pictures = np.random.default_rng(1).integers(0, 256, size=(3, 64, 64, 3), dtype=np.uint8)
    signed = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    embedded, distance = Embedding()(signed), lpips_squeeze(backbone)
    expected = [[distance(a, b) for b in pictures] for a in pictures]
    assert squared_distances(embedded, embedded).numpy() == pytest.approx(np.array(expected), abs=2e-3)


def test_the_same_captions_are_drawn_every_time() -> None:
    pack = Pack(np.zeros((300, 1, 1, 3), np.uint8), [[str(k)] for k in range(300)])
    assert chosen_captions(pack, 200) == chosen_captions(pack, 200) and len(set(chosen_captions(pack, 200))) == 200


def test_the_sheets_show_48_names_and_16_combinations_of_known_words() -> None:
    assert len(set(CAPTIONS)) == 48 and len(set(COMPOSITIONS)) == 16 and not set(CAPTIONS) & set(COMPOSITIONS)
    pipe, video = load_demo_pipeline(), load_demo_video_pipeline()
    assert not [word for prompt in (*CAPTIONS, *COMPOSITIONS) for word in pipe.unknown_words(prompt)]
    assert not [word for prompt in CLIPS for word in video.unknown_words(prompt)]


def test_a_combination_that_was_trained_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no training captions, got blue apple"):
        check_compositions(Pack(np.zeros((1, 1, 1, 3), np.uint8), [["apple", "blue apple"]]))


def test_a_sheet_has_a_cell_for_every_prompt() -> None:
    from PIL import Image

    tile = Image.new("RGB", (64, 64))
    assert labelled_sheet([tile] * 16, [""] * 16).size == (8 * 128, 2 * 144)
    assert clip_sheet([[tile] * 4] * 2, ["", ""]).size == (2 * 4 * 64, 80)


def test_the_shipped_figures_name_their_circumstances() -> None:
    found = json.loads(RESULTS.read_text())
    for told in (found, found["video"]):
        assert 0 <= told["top1_retrieval"] <= 1 and told["images_seen"] > 0 and told["mean_nearest_distance"] > 0
    assert found["hardware"]["cpu"] and found["captions"] == 200 and found["commit"]
    assert (ROOT / "assets" / "contact_sheet.png").exists() and (ROOT / "assets" / "contact_sheet_video.png").exists()


def test_a_folder_without_a_model_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--out", str(tmp_path / "model.json")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "model.json").exists()
