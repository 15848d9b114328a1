"""The page as scripts meet it: the `/compare` endpoint through gradio_client, and the handlers as plain functions."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from analysis.experiment import Request, run_baseline
from analysis.metrics import ssim
from app.handlers import OUTPUTS, Handlers
from app.panels import safe
from tests.serving import Server, serving

RESULT_KEYS = {
    "prompt", "seed", "steps", "schedule", "num_blocks", "cutoff_block", "baseline_seconds", "seconds", "speedup_measured",
    "speedup_ideal", "block_evaluations", "baseline_block_evaluations", "lpips", "lpips_name", "ssim", "psnr", "cache_bytes",
}  # fmt: skip
SETTING: dict[str, Any] = {
    "prompt": "red apple", "seed": 3, "steps": 8, "guidance": 4.0, "reuse_interval": 2, "cutoff_block": 9,
    "window_start": 0.25, "window_end": 1.0,
}  # fmt: skip
PAGE_SETTING = ("red apple", 3, 8, 4.0, "DDIM", 2, 9, 0.25, 1.0, "cosine")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def test_compare_returns_both_pictures_and_every_figure(server: Server, client: Client) -> None:
    baseline, blockdance, figures = client.predict(**SETTING, api_name="/compare")
    assert figures.keys() >= RESULT_KEYS
    assert figures["schedule"] == "ffcrcrcr"
    assert (figures["prompt"], figures["seed"], figures["steps"]) == ("red apple", 3, 8)
    assert figures["block_evaluations"] == 8 * 14 - 3 * 10
    assert figures["speedup_ideal"] == pytest.approx(112 / 82)
    assert figures["fewer_steps"]["steps"] == round(8 / (112 / 82))
    assert ssim(pixels(baseline), pixels(blockdance)) == pytest.approx(figures["ssim"])


def test_the_pictures_are_lossless(server: Server, client: Client) -> None:
    baseline, *_ = client.predict(**SETTING, api_name="/compare")
    direct = run_baseline(server.engine.pipe, Request("red apple", 3, 8))
    assert baseline.endswith(".png")
    assert np.array_equal(pixels(baseline), direct.picture)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cutoff_block": 13}, "cutoff_block must be in [0, 12] for 14 blocks, got 13."),
        ({"reuse_interval": 0}, "reuse_interval must be an integer of at least 1, got 0."),
        ({"window_start": 0.9, "window_end": 0.5}, "window_start must not exceed window_end, got 0.9 > 0.5."),
        ({"steps": 1000}, "steps must be an integer in [1, 100], got 1000."),
        ({"steps": 8.5}, "steps must be an integer in [1, 100], got 8.5."),
        ({"seed": -1}, "seed must be an integer in [0, 4294967295], got -1."),
        ({"guidance": 0}, "guidance must be a number in [1, 20], got 0."),
        ({"prompt": " "}, "prompt must be a text that is not empty, got ' '."),
    ],
)
def test_bad_input_is_answered_with_one_sentence(client: Client, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AppError) as caught:
        client.predict(**(SETTING | change), api_name="/compare")
    assert sentence in str(caught.value)


def test_unknown_words_are_named(client: Client) -> None:
    *_, figures = client.predict(**(SETTING | {"prompt": "red zyxgrblt apple"}), api_name="/compare")
    assert figures["unknown_words"] == ["zyxgrblt"]


def test_compare_is_the_only_public_endpoint(client: Client) -> None:
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/compare"]


def test_two_visitors_at_once_get_their_own_pictures(server: Server, client: Client) -> None:
    settings = [SETTING | {"prompt": "octopus", "seed": 1}, SETTING | {"prompt": "pizza", "seed": 2}]
    expected = [run_baseline(server.engine.pipe, Request(s["prompt"], s["seed"], 8)).picture for s in settings]
    got: dict[int, np.ndarray] = {}

    def visit(index: int) -> None:
        got[index] = pixels(Client(server.url, verbose=False).predict(**settings[index], api_name="/compare")[0])

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1])


def is_left_alone(update: Any) -> bool:
    return isinstance(update, dict) and update.get("__type__") == "update" and "value" not in update


@pytest.fixture(scope="module")
def handlers(server: Server) -> Handlers:
    return server.handlers


def test_the_page_keeps_the_last_comparison_and_gets_each_new_thing_once(handlers: Handlers) -> None:
    everything = list(handlers.update_page("tulip", 5, *PAGE_SETTING[2:]))
    assert all(is_left_alone(update) for update in everything[0][1:])
    status, *rest = zip(*everything, strict=True)
    assert "tulip" in status[-1] and "seed 5" in status[-1]
    sent = [[update for update in updates if update is not None and not is_left_alone(update)] for updates in rest]
    (baseline,), (variant,), (control,), (wipe,), numbers, (similarity,), (bars,) = sent
    assert baseline.shape == variant.shape == control.shape == (64, 64, 3)
    assert wipe[0] is baseline and wipe[1] is variant
    assert "difference from the baseline" in numbers[-1] and "ideal" in numbers[-1]
    assert len(similarity.data[0].z) == 14
    assert sum(len(bar.x) for bar in bars.data) == 8


def test_a_bad_setting_on_the_page_loses_nothing(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    toasts: list[str] = []
    monkeypatch.setattr("gradio.Warning", toasts.append)
    (updates,) = handlers.update_page(*PAGE_SETTING[:7], 0.9, 0.5, "cosine")
    assert len(updates) == OUTPUTS and all(is_left_alone(update) for update in updates)
    assert toasts == ["window_start must not exceed window_end, got 0.9 > 0.5."]


def test_the_schedule_panel_follows_the_sliders_without_a_run(handlers: Handlers) -> None:
    assert "10 of 14 blocks reused on 8 of 30 steps" in handlers.preview(30, 2, 9, 0.40, 0.95)
    assert "<b>1.24×</b>" in handlers.preview(30, 2, 9, 0.40, 0.95)
    assert "Nothing is reused" in handlers.preview(30, 1, 9, 0.40, 0.95)
    assert "cutoff_block must be in" in handlers.preview(30, 2, 13, 0.40, 0.95)


def test_what_a_visitor_typed_cannot_become_markup() -> None:
    assert safe("<b>${alert(1)}</b>") == "&lt;b&gt;&#36;{alert(1)}&lt;/b&gt;"
