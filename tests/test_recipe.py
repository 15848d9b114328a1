"""The recipe of the picture model: what is packed, how captions vary, and where a training may begin."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from assets.recipe.data import Pack, colour_word, is_subject, pack, with_colour
from assets.recipe.model import build_text_encoder, build_tokenizer, build_transformer
from assets.recipe.train import begin_from, pick_caption
from blockdance import load_demo_pipeline


def disc(colour: tuple[int, int, int]) -> np.ndarray:
    """A coloured square in the middle of white."""
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:48, 16:48] = colour
    return picture


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((220, 20, 30), "red"),
        ((240, 220, 20), "yellow"),
        ((30, 160, 40), "green"),
        ((30, 60, 220), "blue"),
        ((120, 120, 120), None),
    ],
)
def test_a_picture_of_one_colour_has_its_word(colour: tuple[int, int, int], word: str | None) -> None:
    assert colour_word(disc(colour)) == word


def test_a_picture_of_two_colours_has_none() -> None:
    both = disc((220, 20, 30))
    both[16:32, 16:48] = (30, 60, 220)
    assert colour_word(both) is None


def test_a_colour_is_said_once() -> None:
    assert with_colour(["fire engine", "engine"], "red") == ["fire engine", "engine", "red engine"]
    assert with_colour(["red apple", "apple"], "red") == ["red apple", "apple"]
    assert with_colour(["zebra"], None) == ["zebra"]


def entry(code: str, name: str, category: str) -> dict[str, Any]:
    return {
        "unified": code,
        "name": name,
        "short_names": [name.lower()],
        "short_name": name.lower(),
        "category": category,
        "sort_order": 1,
    }


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two styles with two subjects each, one of them outside the four categories, and the names."""
    entries = [entry("1F34E", "APPLE", "Food & Drink"), entry("1F52B", "PISTOL", "Objects"), entry("1F1E6", "FLAG", "Flags")]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    for style, colour in (("noto", (220, 20, 30)), ("twemoji", (30, 60, 220))):
        (tmp_path / style).mkdir()
        for one in entries:
            Image.fromarray(disc(colour)).save(tmp_path / style / f"{one['unified'].lower()}.png")
    return {style: tmp_path / style for style in ("noto", "twemoji")}


def test_every_style_of_a_subject_is_packed_and_flags_never(folders: dict[str, Path], tmp_path: Path) -> None:
    few, every = pack(folders, tmp_path), pack(folders, tmp_path, every=True, colour_words=True)
    assert few.styles == ["noto", "twemoji"] and few.captions == [["apple"]] * 2
    assert [group[0] for group in every.captions] == ["apple", "apple", "pistol", "pistol"]
    assert every.captions[0] == ["apple", "red apple"] and every.captions[1] == ["apple", "blue apple"]
    assert pack({"noto": folders["noto"]}, tmp_path).styles == []
    every.save(tmp_path / "pack.npz")
    back = Pack.load(tmp_path / "pack.npz")
    assert back.styles == every.styles and back.captions == every.captions and np.array_equal(back.pictures, every.pictures)


def test_clocks_and_flags_are_no_subjects() -> None:
    assert not is_subject(entry("1F550", "clock1", "Travel & Places"), every=True)
    assert not is_subject(entry("1F1E6", "FLAG", "Flags"), every=True)
    assert is_subject(entry("1F52B", "PISTOL", "Objects"), every=True) and not is_subject(entry("1F52B", "PISTOL", "Objects"))


def test_captions_carry_their_style_and_change_their_order_as_often_as_asked() -> None:
    chance = random.Random(0)
    picked = [pick_caption(["red apple pie"], chance, "noto", reorder=0.5) for _ in range(600)]
    said = [caption for caption in picked if caption]
    styled = [caption for caption in said if caption.startswith("noto ")]
    assert 0.8 < len(styled) / len(said) < 0.97 and 0.05 < picked.count("") / len(picked) < 0.15
    whole = [caption.removeprefix("noto ") for caption in said if len(caption.removeprefix("noto ").split()) == 3]
    assert 0.3 < sum(caption != "red apple pie" for caption in whole) / len(whole) < 0.55
    assert pick_caption(["red apple"], random.Random(1)) in ("red apple", "")


def test_a_training_begins_with_the_weights_and_words_of_a_pipeline() -> None:
    start = load_demo_pipeline()
    tokenizer = build_tokenizer([["red apple", "brandnewword"]], ["noto"])
    text_encoder, transformer = build_text_encoder(len(tokenizer), 128), build_transformer(14, 128)
    begin_from(start, tokenizer, text_encoder, transformer)
    assert tokenizer.convert_tokens_to_ids("noto") != tokenizer.unk_token_id
    ours, theirs = (tool("red apple", return_tensors="pt") for tool in (tokenizer, start.tokenizer))
    with torch.no_grad():
        assert torch.allclose(text_encoder(**ours)[0], start.text_encoder(**theirs)[0], atol=1e-5)
    for name, weight in transformer.state_dict().items():
        assert torch.equal(weight, start.transformer.state_dict()[name])
