"""The page as scripts meet it: the `/compare` endpoint through gradio_client, and the handlers as plain functions."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from analysis.experiment import Request, run_baseline, run_variant
from analysis.metrics import ssim
from app.handlers import Handlers
from blockdance import Schedule
from tests.serving import Server, serving

RESULT_KEYS = {
    "prompt", "seed", "steps", "schedule", "num_blocks", "cutoff_block", "baseline_seconds", "seconds", "speedup_measured",
    "speedup_ideal", "block_evaluations", "baseline_block_evaluations", "lpips", "lpips_name", "ssim", "psnr", "cache_bytes",
}  # fmt: skip
SETTING: dict[str, Any] = {
    "prompt": "red apple", "seed": 3, "steps": 8, "guidance": 4.0, "reuse_interval": 2, "cutoff_block": 9,
    "window_start": 0.25, "window_end": 1.0,
}  # fmt: skip
ORDER: dict[str, Any] = {
    "key": "order 7", "scene_key": "scene 3", "model": "demo", "kinds": "ffcrrrcf", "cutoff_block": 9,
    "request": {"prompt": "tulip zyxgrblt", "seed": 5, "steps": 8, "guidance": 4, "sampler": "DDIM"},
}  # fmt: skip


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


@pytest.fixture(scope="module")
def handlers(server: Server) -> Handlers:
    return server.handlers


@pytest.fixture
def toasts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr("gradio.Warning", shown.append)
    return shown


def picture_in(ref: dict[str, Any]) -> np.ndarray:
    """The tile sheet of a `data:` address."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(ref["src"].split(",")[1]))).convert("RGB"))


def test_the_news_of_a_run_grow_into_a_complete_scene(handlers: Handlers) -> None:
    news = [json.loads(json.dumps(piece)) for piece in handlers.run(ORDER)]
    assert {(piece["key"], piece["scene_key"]) for piece in news} == {("order 7", "scene 3")}
    assert news[-1]["phase"] == "done" and news[-1]["unknown_words"] == ["zyxgrblt"]
    scenes = [piece["scene"] for piece in news if piece["scene"]]
    known = [
        sum(bool(scene[part]) for part in ("baseline", "runs", "map", "features", "controls", "yardsticks")) for scene in scenes
    ]
    assert known == sorted(known) and known[0] >= 2 and known[-1] == 6
    last = scenes[-1]
    (run,), (control,) = last["runs"], last["controls"]
    assert (run["schedule"], run["cutoff_block"], run["live"]) == ("ffcrrrcf", 9, True)
    direct = run_variant(handlers.models.engine("demo").pipe, Request(**ORDER["request"]), Schedule.parse("ffcrrrcf", 9))
    assert np.array_equal(picture_in(run["picture"]), direct.picture)
    assert picture_in(run["previews"]).shape == (64, 8 * 64, 3)
    assert np.asarray(last["map"], dtype=float).shape == (14, 8) and last["map"][0][0] is None
    assert picture_in(last["features"]["blocks"]["7"]).shape == (3 * 8, 8 * 8, 3)
    assert control["steps"] == round(8 / run["speedup_ideal"])


def test_a_bad_order_is_a_toast_and_ends_the_waiting(handlers: Handlers, toasts: list[str]) -> None:
    for change, sentence in (
        ({"kinds": "rrrrrrrr"}, "step 0 reuses but no step before it caches, in rrrrrrrr."),
        ({"kinds": "ffcr"}, "the schedule has 4 steps, the run has 8."),
        ({"kinds": "ffcx"}, "a schedule is written with the letters f, c and r, got 'x' in 'ffcx'."),
        ({"cutoff_block": 13}, "cutoff_block must be in [0, 12] for 14 blocks, got 13."),
        ({"cutoff_block": "9"}, "cutoff_block must be an integer of at least 0, got '9'."),
        ({"request": ORDER["request"] | {"steps": 1e9}}, "steps must be an integer in [1, 100], got 1000000000.0."),
        ({"request": None}, "a request needs prompt, seed, steps, guidance, sampler and a schedule, got "),
        ({"storage": "psychic"}, "storage must be one of latest, extrapolated, got 'psychic'."),
        ({"storage": ["latest"]}, "storage must be one of latest, extrapolated, got ['latest']."),
        ({"model": "../model"}, "model must be one of demo, "),
    ):
        *_, last = handlers.run(ORDER | change)
        assert last["key"] == "order 7" and last["phase"] == "done" and last["error"]
        assert toasts.pop().startswith(sentence)


def test_a_plan_is_a_schedule_with_a_prediction(handlers: Handlers) -> None:
    (news,) = handlers.plan(
        ORDER | {"request": ORDER["request"] | {"steps": 30}, "target_speedup": 1.5, "storage": "extrapolated"}
    )
    found = news["planned"]
    schedule = Schedule.parse(found["schedule"], found["cutoff_block"])
    assert len(schedule) == 30 and not schedule.cutoffs
    assert found["speedup_ideal"] == schedule.ideal_speedup(14) >= 1.5
    assert found["interval"][0] < found["predicted"] < found["interval"][1] and found["storage"] == "extrapolated"


def test_a_plan_that_cannot_be_is_a_toast(handlers: Handlers, toasts: list[str]) -> None:
    for change, sentence in (
        ({"target_speedup": 40}, "target_speedup must be above 1 and at most "),
        ({"target_speedup": None}, "give one goal, target_speedup or max_lpips, got None and None."),
        ({"target_speedup": [2]}, "target_speedup must be above 1 and at most "),
        ({"target_speedup": 2, "model": "dit-xl-2-256"}, "model must be demo to plan here, as it alone ships with a profile"),
        ({"target_speedup": 2, "storage": "psychic"}, "storage must be one of latest, extrapolated, got 'psychic'."),
    ):
        (last,) = handlers.plan(ORDER | change)
        assert last["phase"] == "done" and last["error"]
        assert toasts.pop().startswith(sentence)


def test_measuring_tells_medians_of_rounds(handlers: Handlers) -> None:
    *_, last = handlers.measure(ORDER)
    (run,) = last["scene"]["runs"]
    assert (run["schedule"], run["cutoff_block"], run["rounds"]) == ("ffcrrrcf", 9, 5)
    low, high = run["speedup_measured_quartiles"]
    assert low <= run["speedup_measured"] <= high
    assert last["phase"] == "done"


def test_an_animation_shows_every_step_of_both(handlers: Handlers) -> None:
    *_, last = handlers.animate(ORDER)
    animation = Image.open(io.BytesIO(base64.b64decode(last["animation"].split(",")[1])))
    assert animation.format == "GIF" and animation.size == (2 * 64 * 3, 64 * 3)
    assert animation.n_frames == 8  # type: ignore[attr-defined]


def test_what_ada_decides_comes_with_its_probabilities_and_pictures(handlers: Handlers) -> None:
    *_, last = handlers.decide(ORDER | {"saving": 0.5})
    (one,) = last["decided"]
    assert (last["phase"], last["key"], one["prompt"], one["saving"], one["first"]) == (
        "done",
        "order 7",
        "tulip zyxgrblt",
        0.5,
        3,
    )
    kinds = ["c" if probability >= 0.5 else "r" for probability in one["probabilities"]]
    assert one["schedule"] == "ffc" + "".join(kinds)
    baseline = run_baseline(handlers.models.engine("demo").pipe, Request("tulip zyxgrblt", 5, 8))
    schedule = Schedule.parse(one["schedule"], one["cutoff_block"])
    variant = run_variant(handlers.models.engine("demo").pipe, baseline.request, schedule)
    for picture, name in ((baseline.picture, "baseline"), (variant.picture, "picture")):
        assert np.array_equal(picture_in(one[name]), picture)


def test_two_prompts_are_decided_on_one_after_the_other(handlers: Handlers) -> None:
    *_, last = handlers.decide(ORDER | {"saving": 0.4, "prompts": ["pizza", "castle"]})
    assert [one["prompt"] for one in last["decided"]] == ["pizza", "castle"]


def test_what_ada_cannot_decide_is_a_toast(handlers: Handlers, toasts: list[str]) -> None:
    for change, words in (
        ({"saving": 2}, "saving must be a share in [0, 1], got 2."),
        ({}, "saving must be a share in [0, 1], got None."),
        ({"saving": 0.5, "prompts": ["a", "b", "c"]}, "prompts must be a list of 1 to 2 texts"),
        ({"saving": 0.5, "model": "dit-xl-2-256"}, "model must be demo to let Ada decide, as it alone ships with a policy"),
        ({"saving": 0.5, "prompts": ["pizza", " "]}, "prompt must be a text that is not empty"),
    ):
        (last,) = handlers.decide(ORDER | change)
        assert last["phase"] == "done" and words in toasts[-1]
