"""The page in a real browser: what a visitor sees, moves and stops."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from tests.serving import Server, serving

PATIENCE_MS = 60_000


def launch_chromium(driver: Playwright) -> Browser | None:
    """Playwright's own Chromium, else the machine's, else None."""
    own = Path(driver.chromium.executable_path)
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = str(own) if own.exists() else next(filter(None, map(shutil.which, names)), None)
    return driver.chromium.launch(executable_path=found, args=["--no-sandbox"]) if found else None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = launch_chromium(driver)
        if browser is None:
            pytest.skip("no Chromium on this machine: install it, or run `playwright install chromium`")
        yield browser
        browser.close()


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page.goto(server.url)
    yield page
    page.close()


def wait_until_done(page: Page) -> None:
    """The page shows all of its first comparison, and its event is over: Gradio's own tracker is gone from the status line."""
    expect(page.locator("#status")).to_contain_text("from the same noise")
    expect(page.locator("#numbers")).to_contain_text("plain sampler,")
    expect(page.locator("#bars .js-plotly-plot .bars path")).to_have_count(30)
    expect(page.locator("#status .generating, #status .progress-text, #status .meta-text")).to_have_count(0)


def test_a_newcomer_sees_both_pictures_the_map_and_the_numbers(server: Server, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server.url)
    expect(page.locator("#numbers")).to_contain_text("ideal", timeout=PATIENCE_MS)
    expect(page.locator("#status")).to_contain_text("“red apple” from the same noise", timeout=PATIENCE_MS)
    pictures = page.locator(".bd-picture img")
    expect(pictures).to_have_count(5)
    for index in range(5):
        assert pictures.nth(index).evaluate("picture => [picture.naturalWidth, picture.naturalHeight]") == [64, 64]
    assert all(source.endswith(".png") for source in pictures.evaluate_all("all => all.map(picture => picture.src)"))
    expect(page.locator("#map .js-plotly-plot .hm")).to_have_count(1)
    expect(page.locator("#bars .js-plotly-plot .bars path")).to_have_count(30)
    assert complaints == []
    assert [url for url in requested if not url.startswith((server.url, "data:", "blob:"))] == []
    page.close()


def test_moving_the_cutoff_brings_new_numbers_and_a_new_mask(page: Page) -> None:
    wait_until_done(page)
    expect(page.locator("#numbers")).to_contain_text("10 of 14 blocks reused on 8 of 30 steps")
    page.locator("#cutoff input[type=range]").fill("12")
    expect(page.locator("#schedule")).to_contain_text("13 of 14 blocks reused on 8 of 30 steps")
    expect(page.locator("#numbers")).to_contain_text("13 of 14 blocks reused on 8 of 30 steps")
    expect(page.locator("#map")).to_contain_text("cutoff 12 of 14 blocks")


def test_a_slider_moved_many_times_ends_at_the_last_value(page: Page) -> None:
    wait_until_done(page)
    for cutoff in ("8", "7", "6", "5"):
        page.locator("#cutoff input[type=range]").fill(cutoff)
    expect(page.locator("#numbers")).to_contain_text("6 of 14 blocks reused")
    expect(page.locator("#map")).to_contain_text("cutoff 5 of 14 blocks")


def test_a_bad_setting_is_a_toast_and_the_page_stays(page: Page) -> None:
    wait_until_done(page)
    before = page.inner_text("#numbers")
    page.locator("#start input[type=range]").fill("1")
    expect(page.locator(".toast-body")).to_contain_text("window_start must not exceed window_end, got 1 > 0.95.")
    assert page.inner_text("#numbers") == before


def test_a_value_typed_beyond_a_slider_is_a_toast_that_names_the_range(page: Page) -> None:
    wait_until_done(page)
    box = page.locator("#cutoff input[type=number]")
    box.fill("99")
    box.press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("cutoff_block must be in [0, 12] for 14 blocks, got 99.")


def test_the_stop_button_ends_a_run_and_the_page_stays(page: Page) -> None:
    page.get_by_text("Model and sampling", exact=True).click()
    wait_until_done(page)
    before = page.inner_text("#numbers")
    page.locator("#steps input[type=range]").fill("100")
    expect(page.locator("#status")).to_contain_text("plain sampler …")
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Stopped.")
    assert page.inner_text("#numbers") == before


def test_an_example_is_drawn_at_a_click_and_markup_in_a_prompt_stays_text(page: Page) -> None:
    wait_until_done(page)
    page.get_by_role("button", name="octopus").first.click()
    expect(page.locator("#status")).to_contain_text("“octopus” from the same noise")
    page.get_by_label("Prompt").first.fill("zyxgrblt <img src=x> ${document.title='taken'}")
    page.keyboard.press("Enter")
    expect(page.locator("#numbers .notice")).to_contain_text("“zyxgrblt”")
    expect(page.locator("#status")).to_contain_text("<img src=x> ${document.title='taken'}")
    assert page.title() == "BlockDance Explorer"


def test_closing_the_tab_stops_the_run_and_frees_the_model(server: Server, page: Page) -> None:
    page.get_by_text("Model and sampling", exact=True).click()
    wait_until_done(page)
    engine = server.engine
    calls: list[None] = []
    counting = engine.pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    page.locator("#steps input[type=range]").fill("99")
    expect(page.locator("#status")).to_contain_text("plain sampler …")
    page.close()
    assert engine._model.acquire(timeout=PATIENCE_MS / 1000)
    engine._model.release()
    counting.remove()
    assert 0 < len(calls) < 99


def test_a_model_out_of_reach_is_a_toast_and_the_page_stays(page: Page) -> None:
    page.get_by_text("Model and sampling", exact=True).click()
    wait_until_done(page)
    before = page.inner_text("#numbers")
    page.locator("#model input").click()
    page.get_by_role("option", name="dit-xl-2-256").click()
    expect(page.locator(".toast-body")).to_contain_text("facebook/DiT-XL-2-256 is not on this machine")
    expect(page.locator(".toast-body")).to_have_count(1)
    expect(page.locator("#model input")).to_have_value("demo")
    expect(page.locator("#status")).to_contain_text("“red apple” from the same noise")
    assert page.inner_text("#numbers") == before
