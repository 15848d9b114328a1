"""Colours of the training pictures: the word for one, and the same picture and its captions in another.

A model that has seen a green frog and no green dog takes "green" for a part of the frog. Pictures in further colours that their
captions name show it what the word does.
"""

import colorsys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from skimage.color import hsv2rgb, rgb2hsv

from assets.recipe.sheet import COMPOSITIONS

HUES = {
    20: "red",
    45: "orange",
    70: "yellow",
    165: "green",
    195: "turquoise",
    255: "blue",
    290: "purple",
    340: "pink",
    361: "red",
}
"""Colour words by the hue, in degrees, that they reach up to."""
BROWN = (8, 45, 0.8)
"""Least and greatest hue, and greatest value, of what is brown rather than red or orange."""
MOSTLY = 0.6
"""Share of a picture's coloured pixels that one word must fit."""
PAINTS = {
    "red": (355, 0.8, 0.0, 0.95),
    "orange": (28, 0.9, 0.1, 1.0),
    "yellow": (51, 0.8, 0.25, 1.0),
    "green": (125, 0.65, 0.0, 0.85),
    "blue": (218, 0.75, 0.0, 1.0),
    "purple": (275, 0.6, 0.0, 0.9),
    "pink": (328, 0.45, 0.3, 1.0),
    "brown": (22, 0.65, 0.05, 0.6),
    "black": (0, 0.0, 0.0, 0.35),
    "white": (0, 0.0, 0.6, 0.96),
}
"""Colours to paint with: hue in degrees, saturation, and the values that black and white become."""


def colour_of(hue: float, value: float) -> str:
    """The word for a hue in degrees and a value in [0, 1]."""
    least, greatest, darkest = BROWN
    if least <= hue < greatest and value < darkest:
        return "brown"
    return next(word for limit, word in HUES.items() if hue < limit)


def colour_word(picture: np.ndarray) -> str | None:
    """What most of a picture's coloured pixels are called, if one word fits most of them; uint8 (h, w, 3) on white."""
    seen = [colorsys.rgb_to_hsv(*pixel) for pixel in picture[::2, ::2].reshape(-1, 3) / 255]
    named = [colour_of(360 * hue, value) for hue, strength, value in seen if strength > 0.35 and value > 0.25]
    if len(named) < len(seen) // 20:
        return None
    word, count = Counter(named).most_common(1)[0]
    return word if count >= MOSTLY * len(named) else None


def is_held_out(word: str, caption: str) -> bool:
    """Whether a caption with this colour has all words of a combination that the contact sheet shows as never trained.

    With "red tropical fish" a model would be told of red fish, and where a word is left out in these very words.
    """
    shown = [set(combination.split()) for combination in COMPOSITIONS]
    return any(word in parts and parts <= set(caption.split()) for parts in shown)


def with_colour(captions: list[str], word: str | None) -> list[str]:
    """One caption more, "red" before the shortest name; not if a caption has that word, and not if it is held out."""
    if word is None or any(word in caption.split() for caption in captions):
        return captions
    coloured = f"{word} {min(captions, key=len)}"
    return captions if is_held_out(word, coloured) else [*captions, coloured]


def painted(picture: np.ndarray, word: str) -> np.ndarray:
    """A picture in one of PAINTS: what has the prevailing hue, or where none prevails everything, as far as it is not white.

    Args:
        picture: uint8 (h, w, 3) on white.
        word: of PAINTS.
    """
    hue, strength, value = np.moveaxis(rgb2hsv(picture), 2, 0)
    covered = np.clip(4 * (1 - picture.min(axis=2) / 255), 0, 1)
    if colour_word(picture) is not None:
        turns = np.exp(2j * np.pi * hue)
        away = np.abs(np.angle(turns / (strength * turns).sum(), deg=True))
        covered = covered * np.clip((70 - away) / 20, 0, 1) * np.clip(strength / 0.15, 0, 1)
    to_hue, to_strength, darkest, brightest = PAINTS[word]
    to_value = darkest + (brightest - darkest) * value
    paint = hsv2rgb(np.stack([np.full_like(hue, to_hue / 360), to_strength * np.clip(0.5 + strength, 0, 1), to_value], axis=2))
    mixed = covered[..., None] * paint + (1 - covered[..., None]) * picture / 255
    return np.round(255 * mixed).astype(np.uint8)


def captions_in(word: str, captions: Sequence[str]) -> list[str]:
    """Captions of a picture painted in a colour: its word in place of the colour that was named, or before the rest.

    None at all where one of them is held out.
    """
    told = []
    for caption in captions:
        parts = [word if part in PAINTS else part for part in caption.split()]
        told.append(" ".join(parts if word in parts else [word, *parts]))
    return [] if any(is_held_out(word, caption) for caption in told) else list(dict.fromkeys(told))
