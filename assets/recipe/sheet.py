"""Contact sheets: what the models in the box draw, nothing picked out."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

CAPTIONS = (
    "red apple", "green apple", "lemon", "strawberry", "watermelon", "slice of pizza", "hamburger", "doughnut",
    "birthday cake", "hot beverage", "mushroom", "ear of maize", "grinning face", "smiling face with sunglasses",
    "pouting face", "loudly crying face", "robot face", "ghost", "skull", "alien monster", "broken heart", "pile of poo",
    "cat face", "dog face", "panda face", "pig", "octopus", "tropical fish", "lady beetle", "penguin", "frog face", "koala",
    "elephant", "giraffe", "snail", "butterfly", "tulip", "sunflower", "cactus", "palm tree", "house with garden", "castle",
    "rocket", "police car", "sailboat", "airplane", "rainbow", "crescent moon",
)  # fmt: skip
"""48 names that the picture model was trained with."""
STYLED = (
    "red apple", "octopus", "grinning face", "house with garden", "guitar", "bicycle", "trophy", "crown", "umbrella",
    "teddy bear", "astronaut", "soccer ball", "camera", "dragon", "baseball", "thumbs up sign",
)  # fmt: skip
"""16 names that the model of three styles was trained with."""
COMPOSITIONS = (
    "blue apple", "green car", "smiling cat", "red fish", "yellow octopus", "blue house", "purple pig", "pink elephant",
    "black swan", "green dog face", "white rose", "orange monkey", "red boat", "cat with sunglasses", "smiling sun with heart",
    "two red hearts",
)  # fmt: skip
"""16 combinations of words that both picture models know and that are no caption of a training picture."""
CLIPS = ("grinning face", "pouting face", "clown face", "sparkling heart", "cat face", "unicorn face", "turtle", "dragon")
"""Names that the video model was trained with."""
LABEL_PIXELS = 16


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures row by row on one sheet, in cells as large as the largest."""
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet


def labelled(picture: Image.Image, text: str) -> Image.Image:
    """A picture over its prompt."""
    tile = Image.new("RGB", (picture.width, picture.height + LABEL_PIXELS), "white")
    tile.paste(picture)
    ImageDraw.Draw(tile).text((tile.width / 2, tile.height - 4), text[:22], fill="#444444", anchor="ms")
    return tile


def labelled_sheet(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """Pictures at twice their size, each over its prompt."""
    large = [picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC) for picture in pictures]
    return contact_sheet([labelled(picture, text) for picture, text in zip(large, prompts, strict=True)])


def clip_sheet(clips: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """Two clips a row, frame beside frame, each over its prompt."""
    strips = [contact_sheet(clip, columns=len(clip)) for clip in clips]
    return contact_sheet([labelled(strip, text) for strip, text in zip(strips, prompts, strict=True)], columns=2)
