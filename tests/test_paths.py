"""Whatever names a file or folder is taken everywhere, and a file that cannot be written is told of before it is needed."""

import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import blockdance.ada.curves
import blockdance.ada.train
import blockdance.ada.trainer
import blockdance.demo
import blockdance.paths
import blockdance.presets
from blockdance import ConfigError, PolicyError, Profile, UnsupportedModelError, load_demo_pipeline, load_demo_profile
from blockdance.ada import AdaPolicy, load_demo_policy
from blockdance.ada.curves import write_curves
from blockdance.ada.quality import quality_named
from blockdance.ada.rollouts import Environment
from blockdance.ada.train import read_lines
from blockdance.ada.trainer import TrainConfig, Trainer, drop_later_lines
from blockdance.demo import MODEL_FOLDER, STYLES_FOLDER, VIDEO_FOLDER, load_demo_styles_pipeline, load_demo_video_pipeline
from blockdance.models.stdit import STDiT
from blockdance.paths import AnyPath, ready_for, written
from blockdance.presets import from_folder, load_pipeline
from blockdance.storage import Latest
from tests.tiny import dit
from tests.tiny_video import tiny_stdit


class Named:
    """What names a file and is neither a string nor a Path."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __fspath__(self) -> str:
        return str(self.file)


KINDS: list[Callable[[Path], AnyPath]] = [str, Path, Named]
LOG = '{"update": 1, "reward": 0, "saving": 0, "quality": 0, "entropy": 0, "wanted": 0}\n'


INSIDE = {"loaded", "pipeline_class"}
"""Called by functions that were given whatever names a folder."""


@dataclass(frozen=True)
class Writer:
    name: str
    write: Callable[[AnyPath], object]
    read: Callable[[AnyPath], Any]
    """What may be compared."""


@dataclass(frozen=True)
class Reader:
    name: str
    make: Callable[[Path], object]
    """Makes what is read."""
    read: Callable[[AnyPath], Any]


def trained_in(folder: AnyPath) -> Trainer:
    environment = Environment(load_demo_pipeline(), 0.4, Latest(), {})
    config = TrainConfig(updates=1, scenes=1, rollouts=2, steps=(4,))
    return Trainer(environment, quality_named("ssim"), ["pizza"], [12], config, folder, Accelerator(cpu=True))


def original(file: Path) -> None:
    weights = {name: weight for name, weight in tiny_stdit().state_dict().items() if "pos_embed" not in name}
    torch.save(weights, file)


WRITERS = [
    Writer("profile", lambda file: load_demo_profile().save(file), Profile.load),
    Writer("policy", lambda file: load_demo_policy().save(file), lambda file: AdaPolicy.load(file).config),
    Writer("any file", lambda file: written(file, lambda new: new.write_text("words")), read_lines),
    Writer("training", lambda folder: trained_in(folder).run(), lambda folder: trained_in(folder).update),
]
READERS = [
    Reader("pipeline", lambda folder: dit().save_pretrained(folder), lambda folder: type(load_pipeline(folder))),
    Reader("its folder", lambda folder: dit().save_pretrained(folder), lambda folder: type(from_folder(folder, torch.float32))),
    Reader("prompts", lambda file: file.write_text("pizza\n\nowl\n"), read_lines),
    Reader("log", lambda file: file.write_text(LOG), lambda file: drop_later_lines(file, 1)),
    Reader("curves", lambda file: file.write_text(LOG), lambda file: write_curves(file, os.fspath(file) + ".html")),
    Reader("Open-Sora's weights", original, lambda file: tiny_stdit().load_original(file)),
    Reader("picture", lambda folder: folder.symlink_to(MODEL_FOLDER), lambda folder: type(load_demo_pipeline(folder))),
    Reader("styles", lambda folder: folder.symlink_to(STYLES_FOLDER), lambda folder: load_demo_styles_pipeline(folder).styles),
    Reader(
        "video model", lambda folder: folder.symlink_to(VIDEO_FOLDER), lambda folder: type(load_demo_video_pipeline(folder))
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda one: one.name)
def test_whatever_names_a_file_is_written_and_read_back_and_its_folder_made(
    writer: Writer, kind: Callable[[Path], AnyPath], tmp_path: Path
) -> None:
    file = tmp_path / "not" / "there" / "yet"
    writer.write(kind(file))
    assert writer.read(kind(file)) == writer.read(file)
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("reader", READERS, ids=lambda one: one.name)
def test_whatever_names_a_file_is_read(reader: Reader, kind: Callable[[Path], AnyPath], tmp_path: Path) -> None:
    reader.make(tmp_path / "here")
    assert reader.read(kind(tmp_path / "here")) == reader.read(tmp_path / "here")


def test_nothing_in_the_library_that_takes_a_path_takes_only_some() -> None:
    """So that what is added later is held to it: a parameter that may be a Path may be whatever names a file."""
    modules = [blockdance.ada.curves, blockdance.ada.train, blockdance.ada.trainer, blockdance.demo, blockdance.presets]
    homes: list[Any] = [*modules, Profile, AdaPolicy, Trainer, STDiT]
    for home in homes:
        for name, function in inspect.getmembers(home, inspect.isroutine):
            ours = (getattr(function, "__module__", None) or "").startswith("blockdance")
            hints = typing.get_type_hints(function) if ours else {}
            narrow = [one for one, hint in hints.items() if one != "return" and hint in (Path, Path | str)]
            assert not narrow or name in INSIDE, f"{name} takes {narrow} as a Path alone"


@pytest.mark.parametrize(
    ("load", "error"),
    [
        (Profile.load, ConfigError),
        (AdaPolicy.load, PolicyError),
        (load_pipeline, UnsupportedModelError),
        (load_demo_pipeline, UnsupportedModelError),
        (load_demo_video_pipeline, UnsupportedModelError),
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_missing_is_one_sentence_that_names_it(
    load: Callable[[AnyPath], object], error: type[Exception], kind: Callable[[Path], AnyPath], tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        load(kind(tmp_path / "nowhere"))
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_that_is_a_folder_or_no_text_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no profile can be read from .*: Is a directory"):
        Profile.load(tmp_path)
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="weights holds no profile of a model"):
        Profile.load(tmp_path / "weights")


def test_what_cannot_be_written_is_said_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file, words in ((tmp_path / "file" / "deeper", "folder cannot be made"), (tmp_path, "it is a folder")):
        with pytest.raises(ConfigError, match=words):
            ready_for(file)
        with pytest.raises(ConfigError, match=words):
            load_demo_profile().save(file)
    with pytest.raises(ConfigError, match="folder cannot be made"):
        trained_in(tmp_path / "file")


def test_a_file_that_breaks_off_leaves_the_one_before(tmp_path: Path) -> None:
    written(tmp_path / "one", lambda new: new.write_text("whole"))

    def breaks_off(new: Path) -> None:
        new.write_text("ha")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        written(tmp_path / "one", breaks_off)
    assert (tmp_path / "one").read_text() == "whole"


def test_a_path_is_a_folder_and_never_a_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"or a folder with a diffusers pipeline, got .*demo"):
        load_pipeline(Path("demo"))
    dit().save_pretrained("demo")
    assert type(load_pipeline(Path("demo"))) is type(dit())
