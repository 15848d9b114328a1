"""Visitors choose among models: each gets their own, memory stays bounded, and what cannot be loaded changes nothing."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client

import app.models
from analysis.experiment import RequestError
from analysis.metrics import shift_tolerant_lpips
from app.engine import View
from app.handlers import Handlers
from app.models import KEPT, Models
from app.page import build_page, main, serve
from blockdance import ReuseConfig, UnsupportedModelError
from blockdance.demo import STYLES
from blockdance.presets import DEMO, DEMO_STYLES, PRESETS
from tests.tiny import BLOCKS, dit

SMALL, ALSO_SMALL, THIRD, MISSING = "dit-xl-2-256", "dit-xl-2-512", "pixart-xl-2-256", "pixart-xl-2-1024"
CONFIG = ReuseConfig(2, 3, 0.25, 0.95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT that knows two classes."""
    pipe, folder = dit(size=64), tmp_path_factory.mktemp("dit")
    pipe.register_to_config(id2label={"0": "tench", "1": "golden retriever"})
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def presets(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Three of the presets are the tiny one, a fourth is out of reach."""
    for name in (SMALL, ALSO_SMALL, THIRD):
        there = replace(PRESETS[SMALL], repository=str(folder), config=CONFIG, steps=6, guidance=3.0)
        monkeypatch.setitem(PRESETS, name, there)


@pytest.fixture
def models() -> Models:
    return Models(shift_tolerant_lpips())


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr("gradio.Warning", shown.append)
    return shown


def done(models: Models, name: str) -> View:
    settings = models.settings(name)
    *_, last = models.engine(name).views(replace(settings.request, steps=6), settings.config)
    return last


def test_the_box_comes_first_and_video_models_are_left_out(models: Models) -> None:
    assert models.names[:2] == [DEMO, DEMO_STYLES] and set(models.names) < {DEMO, DEMO_STYLES, *PRESETS}
    assert SMALL in models.names and not any(name.startswith("open-sora") for name in models.names)


def test_a_choice_brings_depth_settings_and_a_prompt_the_model_knows(models: Models) -> None:
    settings = models.settings(SMALL)
    assert settings.num_blocks == BLOCKS and settings.config == CONFIG
    assert (settings.request.steps, settings.request.guidance, settings.request.sampler) == (6, 3.0, "DDIM")
    assert settings.request.prompt == "golden retriever"
    assert models.settings(DEMO).num_blocks == 14 and models.settings(DEMO).request.prompt == "red apple"
    assert models.settings(DEMO).styles == [] and models.settings(SMALL).styles == []
    styled = models.settings(DEMO_STYLES)
    assert styled.styles == list(STYLES) and styled.request.prompt == "fluent red apple"


def order(prompt: str, model: str) -> dict[str, Any]:
    """What a page asks for: six steps, of which two reuse blocks 0 to 3."""
    request = {"prompt": prompt, "seed": 0, "steps": 6, "guidance": 3.0, "sampler": "DDIM"}
    return {"key": "order", "scene_key": "scene", "model": model, "kinds": "ffcrcr", "cutoff_block": 3, "request": request}


def choose(models: Models, name: str, current: str = DEMO) -> list[dict[str, Any]]:
    return list(Handlers(models).choose({"key": "choose", "model": name, "current": current}))


def test_the_controls_follow(models: Models) -> None:
    loading, ready = choose(models, SMALL)
    assert loading["phase"] == f"loading {SMALL}"
    shown = ready["chosen"]
    assert shown["model"] == SMALL and shown["num_blocks"] == BLOCKS
    assert shown["request"] == {"prompt": "golden retriever", "seed": 0, "steps": 6, "guidance": 3.0, "sampler": "DDIM"}
    assert shown["config"] == {"interval": 2, "cutoff": 3, "start": 0.25, "end": 0.95}
    assert shown["known_words"] == ["golden retriever", "tench"]


def test_each_model_has_its_own_results_and_the_box_remembers_its_own(models: Models) -> None:
    box, other = done(models, DEMO), done(models, SMALL)
    assert box.variant is not None and other.variant is not None
    assert (box.variant.figures["num_blocks"], other.variant.figures["num_blocks"]) == (14, BLOCKS)
    again = done(models, DEMO)
    assert again.variant is box.variant and again.observed is box.observed


def test_memory_holds_the_first_model_and_the_last_used(models: Models) -> None:
    alive: list[weakref.ref[Any]] = []
    for turn in range(20):
        engine = models.engine((SMALL, ALSO_SMALL, THIRD)[turn % 3])
        alive.append(weakref.ref(engine.pipe.transformer))
        del engine
        gc.collect()
        assert sum(model() is not None for model in alive) <= KEPT
        assert models.loaded(DEMO) is not None
    assert done(models, DEMO).variant is not None


def test_a_model_that_lost_its_place_is_loaded_again(models: Models) -> None:
    first = done(models, SMALL)
    models.engine(ALSO_SMALL)
    assert models.loaded(SMALL) is None
    news = list(Handlers(models).run(order("golden retriever", SMALL)))
    assert news[0]["phase"] == f"loading {SMALL}" and news[-1]["phase"] == "done"
    assert first.variant is not None and models.loaded(SMALL) is not None
    run = news[-1]["scene"]["runs"][0]
    assert (run["lpips"], run["ssim"]) == (first.variant.figures["lpips"], first.variant.figures["ssim"])


def test_a_model_out_of_reach_is_a_toast_and_nothing_is_lost(models: Models, toasts: list[str]) -> None:
    done(models, SMALL)
    *_, last = choose(models, MISSING, SMALL)
    assert last["model"] == SMALL and last["phase"] == "done" and "chosen" not in last
    (toast,) = toasts
    assert "PixArt-alpha/PixArt-XL-2-1024-MS is not on this machine" in toast and "hf download" in toast
    assert models.loaded(SMALL) is not None and models.loaded(DEMO) is not None


def test_a_model_that_cannot_be_loaded_is_a_toast_too(
    models: Models, toasts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(ImportError("no sentencepiece"))
    )
    *_, last = choose(models, SMALL)
    assert last["model"] == DEMO
    assert toasts[0].endswith("cannot be loaded: no sentencepiece.")


@pytest.mark.parametrize("name", ["open-sora-1.0-16x256x256", "/", "../model"])
def test_only_what_the_page_offers_can_be_chosen(models: Models, toasts: list[str], name: str) -> None:
    """A visitor may not have the server load any folder it holds."""
    *_, last = choose(models, name)
    assert last["model"] == DEMO
    assert "model must be one of demo, demo-styles, dit-xl-2-256, " in toasts[0] and repr(name) in toasts[0]
    *_, last = Handlers(models).run(order("red apple", name))
    assert last["error"] and len(toasts) == 2


def test_models_in_memory_stay_at_hand_while_another_is_loaded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()
    whole = app.models.load_pipeline

    def slow(name: str) -> Any:
        loading.set()
        assert go_on.wait(60)
        return whole(name)

    monkeypatch.setattr(app.models, "load_pipeline", slow)
    loader = threading.Thread(target=models.engine, args=(SMALL,))
    loader.start()
    assert loading.wait(60)
    assert done(models, DEMO).variant is not None
    go_on.set()
    loader.join()
    assert models.loaded(SMALL) is not None


def test_a_class_the_model_does_not_know_is_a_toast(models: Models, toasts: list[str]) -> None:
    *_, last = Handlers(models).run(order("red apple", SMALL))
    assert last["error"] and last["phase"] == "done"
    assert "the name of a class that DiTPipeline knows" in toasts[0]
    with pytest.raises(RequestError):
        list(models.engine(SMALL).views(models.settings(DEMO).request, CONFIG))


@pytest.fixture
def client(models: Models) -> Iterator[Client]:
    page = build_page(Handlers(models))
    serve(page, prevent_thread_lock=True, inbrowser=False, quiet=True)
    yield Client(page.local_url, verbose=False)
    page.close(verbose=False)


def test_scripts_may_name_a_model_or_not(client: Client) -> None:
    common = {"seed": 0, "steps": 6, "guidance": 3.0, "reuse_interval": 2, "window_start": 0.25, "window_end": 0.95}
    *_, box = client.predict(**common, prompt="red apple", cutoff_block=9, api_name="/compare")
    *_, other = client.predict(**common, prompt="tench", cutoff_block=3, model=SMALL, api_name="/compare")
    *_, box_again = client.predict(**common, prompt="red apple", cutoff_block=9, api_name="/compare")
    assert (box["num_blocks"], other["num_blocks"]) == (14, BLOCKS)
    assert box_again == box


def test_two_visitors_at_once_get_the_model_they_chose(client: Client) -> None:
    settings = {DEMO: {"prompt": "octopus", "cutoff_block": 9}, SMALL: {"prompt": "tench", "cutoff_block": 3}}
    got: dict[str, Any] = {}

    def visit(name: str) -> None:
        own = Client(client.src, verbose=False)
        got[name] = own.predict(seed=1, steps=6, **settings[name], model=name, api_name="/compare")[2]

    visitors = [threading.Thread(target=visit, args=(name,)) for name in settings]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert {name: figures["num_blocks"] for name, figures in got.items()} == {DEMO: 14, SMALL: BLOCKS}
    assert {name: figures["prompt"] for name, figures in got.items()} == {DEMO: "octopus", SMALL: "tench"}


def test_the_app_starts_with_the_model_it_is_told(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    served: list[Any] = []
    monkeypatch.setattr("app.page.serve", lambda page, **_: served.append(page))
    monkeypatch.setattr("app.page.perceptual_distance", shift_tolerant_lpips)
    monkeypatch.setattr("sys.argv", ["app.py", "--model", str(folder)])
    main()
    (page,) = served
    (explorer,) = [part for part in page.blocks.values() if part.elem_id == "explorer"]
    settings = json.loads(explorer.js_on_load.split("settings: ")[1].split("});")[0])
    assert settings["models"][0] == settings["defaults"]["model"] == str(folder)
    assert settings["defaults"]["request"]["prompt"] == "golden retriever"


def test_an_unknown_model_ends_the_app_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.page.perceptual_distance", shift_tolerant_lpips)
    monkeypatch.setattr("sys.argv", ["app.py", "--model", "dit-xxl"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: model must be one of demo, ")
    with pytest.raises(UnsupportedModelError):
        Models(shift_tolerant_lpips(), "dit-xxl")
