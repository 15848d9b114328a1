"""The recipe of the picture model: what is packed, how captions vary, and where a training may begin."""

import colorsys
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from assets.recipe.colours import PAINTS, captions_in, colour_of, colour_word, painted, with_colour
from assets.recipe.data import Pack, code_of, is_subject, keywords_of, pack
from assets.recipe.model import build_text_encoder, build_tokenizer, build_transformer
from assets.recipe.train import begin_from, pick_caption, timesteps, with_painted
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
        ((140, 75, 30), "brown"),
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


def test_what_the_contact_sheet_calls_never_trained_is_not_trained() -> None:
    assert with_colour(["pig"], "purple") == ["pig"] and with_colour(["pig"], "green") == ["pig", "green pig"]


@pytest.mark.parametrize("word", PAINTS)
@pytest.mark.parametrize("colour", [(220, 20, 30), (240, 220, 20), (200, 200, 200)])
def test_a_painted_picture_has_the_colour_it_is_said_to_have(word: str, colour: tuple[int, int, int]) -> None:
    drawn = painted(disc(colour), word)
    assert np.array_equal(drawn[:16], disc(colour)[:16]), "white stays white"
    inside = drawn[20:44, 20:44].reshape(-1, 3)
    if word in ("black", "white"):
        assert np.ptp(inside, axis=1).max() == 0 and (inside.mean() < 100) == (word == "black")
    else:
        hue, strength, value = colorsys.rgb_to_hsv(*drawn[32, 32] / 255)
        assert colour_of(360 * hue, value) == word and strength > 0.15


def test_painting_leaves_a_small_part_of_another_colour() -> None:
    apple = disc((220, 20, 30))
    apple[16:22, 16:22] = (30, 160, 40)
    drawn = painted(apple, "blue")
    assert drawn[18, 18].tolist() == [30, 160, 40] and colour_word(drawn) == "blue"


def test_a_painted_picture_says_its_colour_and_no_other() -> None:
    assert captions_in("blue", ["red heart", "heart", "blue heart", "love"]) == ["blue heart", "blue love"]
    assert captions_in("purple", ["pig face", "pig"]) == [], "the contact sheet has a purple pig"
    assert captions_in("red", ["tropical fish"]) == [], "a word left out would tell of the red fish that the sheet has"
    assert captions_in("red", ["two hearts"]) == [] and captions_in("blue", ["two hearts"]) == ["blue two hearts"]


def test_every_picture_is_painted_in_every_colour_but_those_held_out() -> None:
    plain = Pack(np.stack([disc((220, 20, 30))] * 2), [["pig"], ["car", "red car"]], ["noto", "fluent"])
    both, chances = with_painted(plain, 0.3)
    assert len(both) == len(both.pictures) == len(both.styles) == 2 + 2 * len(PAINTS) - 2
    assert chances[:2].tolist() == pytest.approx([0.35, 0.35]) and float(chances.sum()) == pytest.approx(1)
    said = {caption for group in both.captions for caption in group}
    assert {"blue pig", "blue car"} <= said and not {"purple pig", "green car"} & said


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
    for style, colour in (("noto", (220, 20, 30)), ("twemoji", (30, 160, 40))):
        (tmp_path / style).mkdir()
        for one in entries:
            Image.fromarray(disc(colour)).save(tmp_path / style / f"{one['unified'].lower()}.png")
    return {style: tmp_path / style for style in ("noto", "twemoji")}


def test_every_style_of_a_subject_is_packed_and_flags_never(folders: dict[str, Path], tmp_path: Path) -> None:
    few, every = pack(folders, tmp_path), pack(folders, tmp_path, subjects="all", colour_words=True)
    assert few.styles == ["noto", "twemoji"] and few.captions == [["apple"]] * 2
    assert [group[0] for group in every.captions] == ["apple", "apple", "pistol", "pistol"]
    assert every.captions[0] == ["apple", "red apple"] and every.captions[1] == ["apple", "green apple"]
    assert pack({"noto": folders["noto"]}, tmp_path).styles == []
    known = pack(folders, tmp_path, keywords={"1f34e": ["fruit", "apple"]})
    assert known.captions == [["apple", "fruit"]] * 2
    every.save(tmp_path / "pack.npz")
    back = Pack.load(tmp_path / "pack.npz")
    assert back.styles == every.styles and back.captions == every.captions and np.array_equal(back.pictures, every.pictures)


def test_keywords_are_single_plain_words_and_few(tmp_path: Path) -> None:
    told = {
        "\u2764\ufe0f": ["red_heart", "love", ":D", "like", "valentines", "a", "pink", "crush", "dear"],
        "\U0001f34e": ["fruit"],
    }
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "emoji-en-US.json").write_text(json.dumps(told))
    assert keywords_of(tmp_path) == {"2764": ["love", "like", "valentines", "pink", "crush"], "1f34e": ["fruit"]}
    assert code_of("\U0001f469\u200d\U0001f373") == "1f469-200d-1f373"


def test_clocks_and_flags_are_no_subjects() -> None:
    assert not is_subject(entry("1F550", "clock1", "Travel & Places"), "all")
    assert not is_subject(entry("1F1E6", "FLAG", "Flags"), "all")
    assert is_subject(entry("1F52B", "PISTOL", "Objects"), "many")
    assert not is_subject(entry("2660", "SPADE", "Symbols"), "many") and is_subject(entry("2660", "SPADE", "Symbols"), "all")
    assert is_subject(entry("1F9D9", "MAGE", "People & Body"), "many")
    assert not is_subject(entry("1F9D9", "WOMAN MAGE", "People & Body"), "many")
    assert is_subject(entry("1F52B", "PISTOL", "Objects"), "all") and not is_subject(entry("1F52B", "PISTOL", "Objects"))


def test_captions_carry_their_style_and_change_their_order_as_often_as_asked() -> None:
    chance = random.Random(0)
    picked = [pick_caption(["red apple pie"], chance, "noto", reorder=0.5) for _ in range(600)]
    said = [caption for caption in picked if caption]
    styled = [caption for caption in said if "noto" in caption.split()]
    assert 0.8 < len(styled) / len(said) < 0.97 and 0.05 < picked.count("") / len(picked) < 0.15
    assert 0.65 < sum(caption.startswith("noto ") for caption in styled) / len(styled) < 0.85
    assert all(caption.startswith("noto ") or caption.endswith(" noto") for caption in styled)
    bare = [caption.removeprefix("noto ").removesuffix(" noto") for caption in said]
    whole = [caption for caption in bare if len(caption.split()) == 3]
    assert 0.3 < sum(caption != "red apple pie" for caption in whole) / len(whole) < 0.55
    every = {pick_caption(["blue apple pie"], chance) for _ in range(300)}
    assert every == {"", "blue apple pie", "blue apple", "blue pie"}, "a colour is never the word left out"
    assert pick_caption(["red apple"], random.Random(1)) in ("red apple", "")


def test_noisy_timesteps_are_trained_more_often() -> None:
    torch.manual_seed(0)
    drawn = timesteps(10_000)
    assert drawn.min() >= 0 and drawn.max() <= 999 and 0.65 < (drawn >= 500).float().mean() < 0.72


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
