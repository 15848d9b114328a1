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
    prompt_of,
    seen,
    squared_distances,
    styled_prompts,
)
from assets.recipe.sheet import CAPTIONS, CLIPS, COMPOSITIONS, STYLED, clip_sheet, labelled_sheet
from blockdance import load_demo_pipeline, load_demo_styles_pipeline, load_demo_video_pipeline
from blockdance.demo import STYLES
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
        count = len(pack.captions)
        self.known = {prompt_of(pack, k): pack.pictures[(k + shift) % count] / 255 for k in range(count)}

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


def test_the_right_subject_in_another_style_is_retrieved_and_told_apart() -> None:
    pictures = training_set((8, 8, 3)).pictures
    pack = Pack(pictures, [["apple"], ["apple"], ["pear"], ["pear"], ["plum"], ["plum"]], ["noto", "twemoji"] * 3)
    right = evaluate_pictures(Copier(pack), pack, pixels)  # type: ignore[arg-type]
    assert right["top1_retrieval"] == 1 and right["style_retrieval"] == 1
    swapped = Copier(pack)
    swapped.known = {f"{'twemoji' if 'noto' in p else 'noto'} {p.split()[1]}": one for p, one in swapped.known.items()}
    other = evaluate_pictures(swapped, pack, pixels)  # type: ignore[arg-type]
    assert other["top1_retrieval"] == 1 and other["style_retrieval"] == 0


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


def test_every_style_draws_the_same_names_on_the_sheet() -> None:
    asked = styled_prompts()
    assert len(asked) == 64 and {prompt for prompt, _ in asked[48:]} == set(COMPOSITIONS)
    by_style = [{prompt for prompt, one in asked[:48] if one == style} for style in STYLES]
    assert by_style == [set(STYLED)] * 3
    pipe = load_demo_styles_pipeline()
    assert not [word for prompt, _ in asked for word in pipe.unknown_words(prompt)]


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
    for told in (found, found["styles"], found["video"]):
        assert 0 <= told["top1_retrieval"] <= 1 and told["images_seen"] > 0 and told["mean_nearest_distance"] > 0
    assert found["hardware"]["cpu"] and found["captions"] == 200 and found["commit"]
    assert all((ROOT / "assets" / f"contact_sheet{name}.png").exists() for name in ("", "_styles", "_video"))


def test_what_was_seen_counts_the_trainings_before_the_last(tmp_path: Path) -> None:
    one = {"images_seen": 32, "seconds": 10, "hardware": "a core"}
    (tmp_path / "training.json").write_text(json.dumps({"transformer": one}))
    assert seen(tmp_path) == {"images_seen": 32, "training_seconds": 10, "trained_on": "a core"}
    (tmp_path / "training.json").write_text(json.dumps({"transformer": one, "earlier": [one | {"images_seen": 8}]}))
    assert seen(tmp_path) == {"images_seen": 40, "training_seconds": 20, "trained_on": "a core"}


def test_a_folder_without_a_model_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--model", str(tmp_path), "--out", str(tmp_path / "model.json")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "model.json").exists()
