"""What ships with the page: the atlas is what a run would give, and the static site needs nothing else."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from analysis.__main__ import main
from analysis.atlas import ATLAS, MANIFEST, REQUESTS, build_atlas, schedules_of
from analysis.experiment import Request, run_baseline, run_variant
from analysis.metrics import shift_tolerant_lpips
from analysis.records import BenchError
from analysis.scene import Json
from analysis.site import export_site
from blockdance import Schedule, load_demo_pipeline
from tests.test_page import browser, pixels, wait_for_picture  # noqa: F401

MOST_BYTES = 25 * 2**20


@pytest.fixture(scope="module")
def shipped() -> Json:
    manifest: Json = json.loads((ATLAS / MANIFEST).read_text())
    return manifest


def tile(ref: Json, size: list[int], folder: Path = ATLAS) -> np.ndarray:
    sheet = np.asarray(Image.open(folder / ref["src"]).convert("RGB"))
    width, height = size
    top, left = ref["row"] * height, ref["column"] * width
    return sheet[top : top + height, left : left + width]


def test_the_atlas_has_every_prompt_setting_and_control(shipped: Json) -> None:
    assert [Request(**scene["request"]) for scene in shipped["scenes"]] == list(REQUESTS) and len(REQUESTS) == 8
    for scene in shipped["scenes"]:
        settings = [(run["schedule"], run["cutoff_block"]) for run in scene["runs"]]
        expected = [(str(s), s.cutoff_block) for s in schedules_of(scene["request"]["steps"], scene["num_blocks"])]
        assert settings == expected and len(expected) == 3 * 4 * 2
        assert len(scene["controls"]) == 4
        assert all(run["rounds"] == shipped["rounds"] >= 3 for run in scene["runs"] + scene["controls"])
        assert np.asarray(scene["map"], dtype=float).shape == (14, scene["request"]["steps"])
    assert {"commit", "date", "machine", "versions", "dtype", "model", "command"} <= shipped.keys()
    assert sum(file.stat().st_size for file in ATLAS.iterdir()) <= MOST_BYTES


def test_blockdance_visibly_fails_somewhere_in_the_atlas_and_not_at_the_papers_window(shipped: Json) -> None:
    worst = {scene["request"]["prompt"]: max(run["lpips"] for run in scene["runs"]) for scene in shipped["scenes"]}
    assert sum(lpips > 0.2 for lpips in worst.values()) >= 2
    usual = [run["lpips"] for scene in shipped["scenes"][:6] for run in scene["runs"][:12]]
    assert max(usual) < 0.01


@pytest.mark.parametrize(("scene", "run"), [(0, 1), (6, 23)])
def test_what_ships_is_what_a_run_gives(shipped: Json, scene: int, run: int) -> None:
    """The same picture, but for the rounding of another processor."""
    told, pipe = shipped["scenes"][scene], load_demo_pipeline()
    request, ran = Request(**told["request"]), told["runs"][run]
    baseline = run_baseline(pipe, request)
    variant = run_variant(pipe, request, Schedule.parse(ran["schedule"], ran["cutoff_block"]), baseline.recording)
    for ref, picture in ((told["baseline"]["picture"], baseline.picture), (ran["picture"], variant.picture)):
        assert np.abs(tile(ref, told["size"]).astype(int) - picture).mean() < 1
    assert ran["block_evaluations"] == variant.trace.block_evaluations
    assert ran["speedup_ideal"] == pytest.approx(variant.trace.speedup_ideal, abs=1e-6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of one request."""
    folder = tmp_path_factory.mktemp("atlas")
    build_atlas(load_demo_pipeline(), shift_tolerant_lpips(), folder, [Request("red apple", steps=8)], rounds=1)
    return folder


def test_pictures_are_kept_without_loss_and_each_where_the_manifest_says(small: Path) -> None:
    (scene,) = json.loads((small / MANIFEST).read_text())["scenes"]
    request, pipe = Request(**scene["request"]), load_demo_pipeline()
    baseline = run_baseline(pipe, request)
    assert np.array_equal(tile(scene["baseline"]["picture"], scene["size"], small), baseline.picture)
    for run in scene["runs"][::7]:
        variant = run_variant(pipe, request, Schedule.parse(run["schedule"], run["cutoff_block"]))
        assert np.array_equal(tile(run["picture"], scene["size"], small), variant.picture)
        last = run["previews"] | {"column": 7}
        assert np.abs(tile(last, scene["size"], small).astype(int) - variant.picture).mean() < 4
    for control in scene["controls"]:
        plain = run_baseline(pipe, Request("red apple", steps=control["steps"]))
        assert np.array_equal(tile(control["picture"], scene["size"], small), plain.picture)


def test_bad_input_is_one_sentence(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BenchError, match="rounds must be at least 1, got 0"):
        build_atlas(None, shift_tolerant_lpips(), tmp_path, rounds=0)
    with pytest.raises(BenchError, match=r"manifest.json is missing; `python -m analysis atlas` writes it"):
        export_site(tmp_path / "site", tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["analysis", "export-site", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: DIR must be a folder, got the file ")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    export_site(tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_static_site_explores_the_atlas_without_python(site: str, browser: Browser) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": 1360, "height": 1000}, reduced_motion="reduce")
    complaints: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(site)
    wait_for_picture(page)
    before = pixels(page, "variant")
    page.locator("[name=interval]").fill("4")
    wait_for_picture(page)
    expect(page.locator(".bd-figures")).to_contain_text("1.40×")
    assert pixels(page, "variant") != before
    page.locator("[name=cutoff]").fill("10")
    expect(page.locator(".bd-status")).to_contain_text("Not among the shipped comparisons")
    expect(page.locator(".bd-plan")).to_contain_text("11 of 14 blocks reused")
    page.locator("[data-plot=tradeoff]").scroll_into_view_if_needed()
    expect(page.locator("[data-plot=tradeoff] .points path").first).to_be_visible()
    assert page.get_by_text("Model and sampling").count() == 0
    assert complaints == []
    assert [url for url in requested if not url.startswith((site, "data:", "blob:"))] == []
    page.close()
