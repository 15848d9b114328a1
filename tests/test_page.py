"""The explorer in a real browser, over the app: what a visitor sees, moves and stops."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from analysis.browser import launch_chromium
from analysis.tables_compare import CURVES
from blockdance import ReuseConfig, Schedule, fixed_schedule
from tests.serving import Server, serving

PATIENCE_MS = 60_000
PAPER = {"interval": 2, "cutoff": 9, "start": 0.4, "end": 0.95}
MARKUP = "<img src=x onerror=\"document.title='taken'\">${document.title='taken'}{{value}}"


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
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Page]:
    page = opened(browser, server.url)
    yield page
    page.close()


def opened(browser: Browser, url: str, **context: Any) -> Page:
    """The page once its shipped example stands still; motion is off, so nothing plays by itself."""
    page = browser.new_page(**({"viewport": {"width": 1360, "height": 1000}, "reduced_motion": "reduce"} | context))
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    expect(page.locator(".bd-chips button")).to_have_count(8)
    return page


class Calls:
    """Counts the calls of the model of a server."""

    def __init__(self, server: Server) -> None:
        self.total = 0
        self.hook = server.engine.pipe.transformer.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.total += 1


@pytest.fixture
def calls(server: Server) -> Iterator[Calls]:
    calls = Calls(server)
    yield calls
    calls.hook.remove()


def slide(page: Page, name: str, value: float) -> None:
    page.locator(f".bd-sliders [name={name}]").fill(str(value))


def wait_for_live(page: Page) -> None:
    expect(page.locator(".bd-status")).to_contain_text("computed live")


def wait_for_picture(page: Page) -> None:
    expect(page.locator("[data-picture=variant]:not(.stale)")).to_have_count(1)


def pixels(page: Page, picture: str) -> list[int]:
    """The colours a canvas shows."""
    page.wait_for_timeout(100)
    shown: list[int] = page.locator(f"[data-picture={picture}]").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    return shown


def on_map(page: Page, block: float, step: float) -> tuple[float, float]:
    """Where a block and a step lie on the screen; block -1 is the band of steps below the map."""
    page.locator("[data-map]").scroll_into_view_if_needed()
    box = page.locator("[data-map]").bounding_box()
    assert box is not None
    left, top, row, blocks, steps = 44, 8, 21, 14, 30
    y = top + row * blocks + 14 if block == -1 else top + row * (blocks - 0.5 - block)
    return box["x"] + left + (step + 0.5) * (box["width"] - left - 12) / steps, box["y"] + y


def test_the_first_screen_is_complete_without_a_call_of_the_model(server: Server, browser: Browser, calls: Calls) -> None:
    complaints: list[str] = []
    requested: list[str] = []
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server.url)
    expect(page.locator(".bd-status")).to_contain_text("shipped with the page")
    expect(page.locator(".bd-scrubber output")).to_contain_text("expected at step")  # it plays
    expect(page.locator(".bd-scrubber output")).to_contain_text("final picture")
    expect(page.locator(".bd-figures")).to_contain_text("1.24×")
    for picture in ("baseline", "variant", "control", "both"):
        assert len(set(pixels(page, picture))) > 50
    page.locator("[data-plot=tradeoff]").scroll_into_view_if_needed()
    expect(page.locator("[data-plot=tradeoff] .points path").first).to_be_visible()
    assert calls.total == 0
    assert complaints == []
    assert [url for url in requested if not url.startswith((server.url, "data:", "blob:"))] == []
    page.close()


def test_a_setting_of_the_atlas_is_shown_at_once_and_costs_no_call(page: Page, calls: Calls) -> None:
    wait_for_picture(page)
    before = pixels(page, "variant")
    for interval, cutoff, start, end in ((3, 12, 0.4, 0.95), (4, 12, 0, 1), (4, 3, 0, 1)):
        for name, value in {"end": end, "start": start, "interval": interval, "cutoff": cutoff}.items():
            move = "(slider, value) => { slider.value = value; slider.oninput(); }"
            page.locator(f".bd-sliders [name={name}]").evaluate(move, value)
        wait_for_picture(page)
        expect(page.locator(".bd-status")).to_contain_text("shipped with the page")
    assert pixels(page, "variant") != before
    assert calls.total == 0


def test_a_setting_beyond_the_atlas_runs_live(page: Page, server: Server) -> None:
    slide(page, "cutoff", 10)
    expect(page.locator(".bd-plan")).to_contain_text("11 of 14 blocks reused on 8 of 30 steps. Ideal speedup 1.27×.")
    wait_for_live(page)
    expect(page.locator(".bd-numbers tbody tr").first).not_to_contain_text("…")
    expect(page.locator(".bd-status")).to_contain_text("“red apple”")


def test_the_schedule_follows_python_for_every_setting(page: Page) -> None:
    """The page's arithmetic is the library's, to the last step."""
    windows = [(a / 20, b / 20) for a in range(0, 21, 3) for b in range(a, 21, 4)]
    cases = [(n, *window, steps) for n in (1, 2, 3, 6) for window in windows for steps in (3, 10, 30, 50)]
    theirs = page.evaluate(
        "cases => cases.map(([interval, start, end, steps]) => BlockDance.fixedSchedule({interval, start, end}, steps))", cases
    )
    ours = [str(fixed_schedule(ReuseConfig(n, 9, start, end), steps, 14)) for n, start, end, steps in cases]
    assert theirs == ours
    ideal = page.evaluate("kinds => kinds.map((kinds) => BlockDance.idealSpeedup(kinds, 9, 14))", ours)
    for (n, start, end, steps), speedup in zip(cases, ideal, strict=True):
        assert speedup == pytest.approx(fixed_schedule(ReuseConfig(n, 9, start, end), steps, 14).ideal_speedup(14))


def test_dragging_the_cutoff_line_changes_mask_and_number(page: Page) -> None:
    wait_for_picture(page)
    x, y = on_map(page, 9.5, 5)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(*on_map(page, 6.5, 5), steps=4)
    page.mouse.up()
    expect(page.locator(".bd-plan")).to_contain_text("7 of 14 blocks reused on 8 of 30 steps")
    expect(page.locator(".bd-figures")).to_contain_text("1.15×")
    expect(page.locator(".bd-sliders [name=cutoff]")).to_have_value("6")


def test_dragging_an_edge_of_the_window_moves_it(page: Page) -> None:
    wait_for_picture(page)
    page.mouse.move(*on_map(page, 12, 11.5))
    page.mouse.down()
    page.mouse.move(*on_map(page, 12, 17.5), steps=4)
    page.mouse.up()
    expect(page.locator(".bd-sliders [name=start]")).to_have_value("0.6")
    expect(page.locator(".bd-plan")).to_contain_text("reused on 5 of 30 steps")


def test_a_click_on_a_step_edits_the_schedule_and_the_sliders_bring_it_back(page: Page) -> None:
    wait_for_picture(page)
    page.mouse.click(*on_map(page, -1, 13))
    expect(page.locator(".bd-plan")).to_contain_text("Schedule ffffffffffffcccrcrcrcrcrcrcrff.")
    expect(page.locator(".bd-edited")).to_be_visible()
    wait_for_live(page)
    expect(page.locator(".bd-figures")).to_contain_text("1.20×")
    page.get_by_role("button", name="Back to the sliders").click()
    expect(page.locator(".bd-plan")).to_contain_text("Schedule ffffffffffffcrcrcrcrcrcrcrcrff.")
    expect(page.locator(".bd-edited")).to_be_hidden()


def test_hovering_a_column_previews_its_step_and_a_click_pins_it(page: Page) -> None:
    wait_for_picture(page)
    final = pixels(page, "baseline")
    page.mouse.move(*on_map(page, 4, 13))
    expect(page.locator(".bd-tip")).to_contain_text("block 4, step 13: cosine 0.99")
    expect(page.locator(".bd-tip")).to_contain_text("reused from step 12")
    expect(page.locator(".bd-scrubber output")).to_contain_text("expected at step 13 of 30, reuse")
    page.mouse.move(*on_map(page, 11, 2))
    expect(page.locator(".bd-tip")).to_contain_text("block 11, step 2")
    expect(page.locator(".bd-tip")).to_contain_text("computed")
    page.mouse.click(*on_map(page, 11, 2))
    page.mouse.move(5, 5)
    expect(page.locator(".bd-scrubber output")).to_contain_text("expected at step 2 of 30, full")
    expect(page.locator(".bd-features")).to_contain_text("at step 2")
    assert pixels(page, "baseline") != final


def test_a_line_through_the_last_two_outputs_can_be_chosen(page: Page) -> None:
    slide(page, "interval", 3)
    wait_for_picture(page)
    paper = page.inner_text(".bd-figures")
    page.locator("[name=storage]").select_option("extrapolated")
    wait_for_live(page)
    expect(page.locator(".bd-numbers tbody tr").first).to_contain_text("BlockDance, extrapolated")
    assert page.inner_text(".bd-figures") != paper
    expect(page).to_have_url(re.compile("storage=extrapolated"))
    page.locator("[name=storage]").select_option("latest")
    wait_for_picture(page)
    assert page.inner_text(".bd-figures") == paper


def test_everything_on_the_map_has_a_key(page: Page) -> None:
    wait_for_picture(page)
    page.locator("[data-map]").focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".bd-plan")).to_contain_text("9 of 14 blocks reused")
    for _ in range(14):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".bd-scrubber output")).to_contain_text("expected at step 13")
    page.keyboard.press("Enter")
    expect(page.locator(".bd-plan")).to_contain_text("cccrcrcrcrcrcrcrff")
    page.keyboard.press("Escape")
    expect(page.locator(".bd-scrubber output")).to_contain_text("final picture")
    page.get_by_text("The map as a table").click()
    expect(page.locator(".bd-table tbody tr")).to_have_count(14)
    expect(page.locator(".bd-table td.reused")).to_have_count(7 * 9)


def test_the_strip_loads_an_interval_and_keeps_the_focus(page: Page) -> None:
    wait_for_picture(page)
    third = page.locator(".bd-strip button").nth(2)
    expect(third).to_contain_text("1.31× ideal, LPIPS")
    third.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".bd-plan")).to_contain_text("Ideal speedup 1.31×")
    expect(third).to_have_attribute("aria-pressed", "true")
    expect(third).to_be_focused()


def test_the_address_holds_every_setting_and_brings_it_back(server: Server, browser: Browser, page: Page) -> None:
    wait_for_picture(page)
    page.get_by_role("button", name="octopus").click()
    slide(page, "interval", 3)
    page.mouse.click(*on_map(page, 11, 8))
    page.mouse.click(*on_map(page, -1, 13))
    page.get_by_role("button", name="log(1 − cos)").click()
    plan = page.inner_text(".bd-plan")
    page.wait_for_timeout(500)
    again = opened(browser, page.url)
    expect(again.locator(".bd-plan")).to_have_text(plan)
    expect(again.locator(".bd-scrubber output")).to_contain_text("expected at step 8")
    expect(again.locator(".bd-chips button[aria-pressed=true]")).to_have_text("octopus")
    expect(again.locator(".bd-scales button[aria-pressed=true]")).to_have_text("log(1 − cos)")
    again.close()


def test_what_is_changed_while_the_steps_play_is_in_the_address_afterwards(page: Page) -> None:
    page.get_by_role("button", name="Play the steps").click()
    slide(page, "cutoff", 6)
    expect(page).to_have_url(re.compile("i=6"))
    assert "step=" not in page.url


def test_wrong_values_in_the_address_are_clamped_with_a_notice(server: Server, browser: Browser) -> None:
    page = opened(browser, f"{server.url}?i=99&n=two&start=0.9&end=0.5&s=rrr&step=-3&hide=tradeoff,nonsense")
    for told in (
        "i=99 is not in [0, 12]; 12 is used",
        "n=two is not in [1, 6]; 2 is used",
        "start=0.9 exceeds end=0.5",
        "s=rrr is not a schedule of 30 steps",
        "step=-3 is not in [0, 29]; 0 is used",
        "hide=nonsense is not one of",
    ):
        expect(page.locator(".bd-notices")).to_contain_text(told)
    expect(page.locator(".bd-tradeoff")).to_be_hidden()
    expect(page.locator(".bd-map")).to_be_visible()
    page.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("prompt=", "prompt is empty; “red apple” is used"),
        ("prompt=" + "a" * 301, "prompt has 301 letters; the first 300 are used"),
        ("model=nonsense", "model=nonsense is not one of demo, "),
    ],
)
def test_a_prompt_or_a_model_that_cannot_be_used_is_told(server: Server, browser: Browser, given: str, told: str) -> None:
    page = opened(browser, f"{server.url}?{given}")
    expect(page.locator(".bd-notices")).to_contain_text(told)
    page.close()


def test_the_address_loads_its_model_before_the_rest_is_read(server: Server, browser: Browser) -> None:
    """Its settings are of that model, and those of the model's own stay behind them."""
    page = browser.new_page(reduced_motion="reduce")
    page.goto(f"{server.url}?model=dit-xl-2-256&prompt=rocket&n=3")
    expect(page.locator(".toast-body")).to_contain_text("facebook/DiT-XL-2-256 is not on this machine", timeout=PATIENCE_MS)
    expect(page.locator(".bd-status")).to_contain_text("“rocket”")  # by the model that stays
    expect(page.locator(".bd-sliders [name=interval]")).to_have_value("3")
    mounted = page.evaluate(
        """async () => {
            const orders = [], root = document.createElement("div");
            history.replaceState(null, "", "?model=other&i=20&prompt=tabby&steps=40");
            const live = (what, order) => orders.push([what, order.model, order.request?.steps]);
            const settings = {models: ["demo", "other"], samplers: ["DDIM"]};
            const explorer = BlockDance.mount(root, {atlas: "atlas/", settings, live});
            while (!orders.length) await new Promise((resolve) => setTimeout(resolve, 20));
            explorer.receive({key: "choose", phase: "done", chosen: {model: "other", num_blocks: 28,
                request: {prompt: "dog", seed: 0, steps: 50, guidance: 4, sampler: "DDIM"},
                config: {interval: 2, cutoff: 20, start: 0.4, end: 0.95}}});
            while (orders.length < 2) await new Promise((resolve) => setTimeout(resolve, 20));
            return {orders, cutoff: explorer.cutoff, prompt: explorer.state.request.prompt, url: explorer.settingsUrl()};
        }"""
    )
    assert mounted["orders"] == [["choose", "other", 30], ["run", "other", 40]]
    assert mounted["cutoff"] == 20 and mounted["prompt"] == "tabby" and "model=other" in mounted["url"]
    page.close()


def test_markup_in_a_prompt_or_an_address_stays_text(server: Server, browser: Browser) -> None:
    page = opened(browser, server.url)
    page.locator("#bd-prompt").fill(MARKUP)
    page.keyboard.press("Enter")
    wait_for_live(page)
    expect(page.locator(".bd-status")).to_contain_text(MARKUP)
    expect(page.locator(".bd-notices")).to_contain_text("Words the model does not know")
    page.wait_for_timeout(500)
    again = opened(browser, f"{page.url}&scale={MARKUP}&hide={MARKUP}".replace("#", "%23"))
    expect(again.locator(".bd-status")).to_contain_text(MARKUP)
    for shown in (page, again):
        assert shown.title() == "BlockDance Explorer"
        assert shown.locator(".bd img").count() == 0
        shown.close()


def test_the_tour_can_be_taken_from_start_to_end(page: Page, calls: Calls) -> None:
    page.get_by_role("button", name="Take the tour").click()
    tour = page.get_by_role("dialog", name="Tour")

    def act_and_go_on(title: str, action: str) -> None:
        expect(tour).to_contain_text(title)
        tour.get_by_role("button", name=action).click()

    act_and_go_on("Compare", "Show the octopus")
    expect(page.locator(".bd-chips button[aria-pressed=true]")).to_have_text("octopus")
    tour.get_by_role("button", name="Next").click()
    act_and_go_on("Watch structure appear", "Play the steps")
    expect(page.locator(".bd-scrubber output")).to_contain_text("expected at step")
    expect(page.locator(".bd-scrubber output")).to_contain_text("final picture")
    tour.get_by_role("button", name="Next").click()
    act_and_go_on("Why the map is bright", "Spread the values near 1")
    tour.get_by_role("button", name="Next").click()
    expect(tour.locator(".bd-done")).to_be_empty()
    act_and_go_on("Drag the cutoff", "Move it for me")
    expect(tour.locator(".bd-done")).to_contain_text("Done: cutoff 12")
    tour.get_by_role("button", name="Next").click()
    act_and_go_on("Break it", "Reuse from the first step")
    expect(tour.locator(".bd-done")).to_contain_text("LPIPS")
    tour.get_by_role("button", name="Next").click()
    act_and_go_on("Let Ada decide", "Switch it on")
    expect(tour.locator(".bd-done")).to_contain_text("Done: fffffffffffc")
    expect(page.locator(".bd-status p")).to_contain_text("computed live")
    tour.get_by_role("button", name="Next").click()
    asked = calls.total
    act_and_go_on("Your turn", "Back to the paper's window")
    expect(tour.locator(".bd-done")).to_be_empty()
    slide(page, "cutoff", 12)
    slide(page, "interval", 3)
    expect(tour.locator(".bd-done")).to_contain_text("Done: 1.45×")
    tour.get_by_role("button", name="Finish").click()
    expect(tour).to_be_hidden()
    assert calls.total == asked


def test_the_tour_is_taken_by_keys_and_skips_what_is_hidden(server: Server, browser: Browser) -> None:
    page = opened(browser, f"{server.url}?hide=map,ada")
    page.get_by_role("button", name="Take the tour").focus()
    page.keyboard.press("Enter")
    tour = page.get_by_role("dialog", name="Tour")
    expect(tour).to_be_focused()
    for title in ("1 of 4", "Watch structure appear", "Break it", "Your turn"):
        expect(tour).to_contain_text(title)
        next_step = tour.get_by_role("button", name="Next")
        if next_step.count():
            next_step.focus()
            page.keyboard.press("Enter")
            expect(tour).to_be_focused()
    page.keyboard.press("Escape")
    expect(tour).to_be_hidden()
    expect(page.get_by_role("button", name="Take the tour")).to_be_focused()
    page.close()


def test_the_controls_and_the_status_stay_in_sight(page: Page) -> None:
    wait_for_picture(page)
    page.locator("[data-part=tradeoff]").scroll_into_view_if_needed()
    for place in (".bd-sliders", ".bd-status"):
        expect(page.locator(place)).to_be_in_viewport()


def test_a_site_without_python_may_hide_what_only_the_app_has(page: Page) -> None:
    told = page.evaluate(
        """() => {
            history.replaceState(null, "", "?hide=planner,ada,nonsense");
            const root = document.createElement("div");
            BlockDance.mount(root, {atlas: "atlas/"});
            return root.querySelector(".bd-notices").textContent;
        }"""
    )
    assert "hide=nonsense is not one of" in told and "hide=planner" not in told and "hide=ada" not in told


def test_a_decision_not_to_reuse_leaves_the_cutoff_where_it_was(page: Page) -> None:
    told = page.evaluate(
        """() => {
            const explorer = BlockDance.mount(document.createElement("div"), {atlas: "atlas/", settings: {}});
            explorer.set({ada: true, edited: null});
            const decision = {saving: 0.5, schedule: "f".repeat(30), cutoff_block: 0, storage: "latest"};
            explorer.useDecisions(explorer.sceneKey(), [{...decision, first: 12, probabilities: Array(18).fill(0.9)}]);
            const decided = Boolean(explorer.decision);
            explorer.set({edited: null});
            return [decided, explorer.cutoff];
        }"""
    )
    assert told == [True, 9]


@pytest.mark.parametrize(
    "context", [{"viewport": {"width": 390, "height": 844}}, {"color_scheme": "dark"}], ids=["narrow", "dark"]
)
def test_nothing_is_cut_off_on_a_phone_and_text_can_be_read_in_the_dark(
    server: Server, browser: Browser, context: dict[str, Any]
) -> None:
    page = opened(browser, server.url, **context)
    wait_for_picture(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".bd-numbers").evaluate("numbers => numbers.scrollWidth <= numbers.clientWidth")
    ink, paper = page.evaluate(
        """() => { const style = getComputedStyle(document.querySelector('.bd-numbers'));
        const sum = (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((total, part) => total + Number(part), 0);
        return [sum(style.color), sum(style.backgroundColor)]; }"""
    )
    assert abs(ink - paper) > 380  # of 765
    page.close()


def test_what_is_taken_away_holds_the_setting(page: Page, tmp_path: Path) -> None:
    wait_for_picture(page)

    def taken(name: str) -> Path:
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        return tmp_path / download.value.suggested_filename

    card = Image.open(taken("Comparison card"))
    facts = json.loads(card.text["blockdance"])  # type: ignore[attr-defined]
    assert card.size == (1200, 630)
    assert facts["request"]["prompt"] == "red apple" and facts["cutoff_block"] == 9 and "n=2" in facts["address"]
    assert json.loads(taken("Run (JSON)").read_text()) | {"address": ""} == facts | {"address": ""}
    lines = taken("Similarity (CSV)").read_text().splitlines()
    assert lines[0] == "block,step,cosine,kind,reused" and len(lines) == 1 + 14 * 30
    assert sum(line.endswith("true") for line in lines) == 10 * 8
    animation = Image.open(taken("Both samplers"))
    assert animation.n_frames == 30 and animation.width == 2 * animation.height  # type: ignore[attr-defined]


RECORD_LABELS = """() => {
    const write = CanvasRenderingContext2D.prototype.fillText;
    window.labels = [];
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y, most) {
        if (this.canvas.width === 1200) labels.push({text, x, y, end: x + this.measureText(text).width});
        write.call(this, text, x, y, most);
    };
}"""


@pytest.mark.parametrize("context", [{"viewport": {"width": 390, "height": 844}}, {}], ids=["narrow", "wide"])
def test_no_label_of_the_card_leaves_its_column(server: Server, browser: Browser, context: dict[str, Any]) -> None:
    page = opened(browser, server.url, **context)
    wait_for_picture(page)
    page.evaluate(RECORD_LABELS)
    with page.expect_download():
        page.get_by_role("button", name="Comparison card").click()
    labels = page.evaluate("labels")
    columns = [label for label in labels if 360 < label["y"] < 420]
    assert len(columns) == 6 and any("measured" in label["text"] for label in columns)
    assert all(label["end"] <= label["x"] + 250 for label in columns)
    assert all(label["end"] <= 1170 for label in labels)
    page.close()


def test_measuring_properly_brings_medians_of_interleaved_rounds(page: Page) -> None:
    wait_for_picture(page)
    page.get_by_role("button", name="Measure properly").click()
    expect(page.locator(".bd-numbers")).to_contain_text("medians of 5 interleaved rounds, quartiles")


@pytest.mark.parametrize(
    ("sampler", "steps", "schedule"), [("DDIM", 8, "ffcrrcrf"), ("Heun", 6, "ffcrcf"), ("DPM-Solver++", 8, "ffcrrcrf")]
)
def test_the_python_to_copy_draws_what_the_page_shows(
    server: Server, browser: Browser, sampler: str, steps: int, schedule: str
) -> None:
    page = opened(
        browser,
        f"{server.url}?prompt=tulip&steps={steps}&i=7&s={schedule}&storage=extrapolated&sampler={sampler.replace('+', '%2B')}",
        permissions=["clipboard-read", "clipboard-write"],
    )
    wait_for_live(page)
    page.bring_to_front()  # the clipboard is for a page with the focus
    page.get_by_role("button", name="Copy Python").click()
    expect(page.locator(".bd-notices")).to_contain_text("Python copied.")
    names: dict[str, Any] = {}
    exec(page.evaluate("navigator.clipboard.readText()"), names)
    assert names["trace"].kinds == schedule and names["trace"].schedule.cutoff_block == 7
    drawn = np.asarray(names["image"].convert("RGBA"))
    assert np.array_equal(np.asarray(pixels(page, "variant"), dtype=np.uint8).reshape(64, 64, 4), drawn)
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator(".bd-notices")).to_contain_text("Link copied.")
    assert f"s={schedule}" in page.evaluate("navigator.clipboard.readText()")
    page.close()


def test_the_python_to_copy_loads_the_model_that_is_shown(page: Page) -> None:
    request = {"prompt": "tabby", "seed": 0, "steps": 50, "guidance": 4, "sampler": "DDIM"}
    told = page.evaluate(
        """defaults => {
            history.replaceState(null, "", location.pathname);  // or the address would say what is shown
            return BlockDance.mount(document.createElement("div"), {atlas: "atlas/", settings: {defaults}}).python();
        }""",
        {"model": "dit-xl-2-256", "request": request, "config": PAPER},
    )
    assert (
        'load_pipeline("dit-xl-2-256")' in told and "DDIMScheduler.from_config" in told and 'get_label_ids(["tabby"])' in told
    )
    compile(told, "copied", "exec")


def test_a_second_run_sees_its_place_in_the_queue_and_the_atlas_does_not_wait(
    server: Server, browser: Browser, page: Page
) -> None:
    page.get_by_text("Model and sampling").click()
    page.locator("[name=steps]").fill("100")
    page.keyboard.press("Enter")
    expect(page.locator(".bd-status")).to_contain_text("plain sampler …")
    second = opened(browser, server.url)
    second.get_by_role("button", name="rocket").click()  # what is shipped does not wait
    wait_for_picture(second)
    expect(second.locator(".bd-status")).to_contain_text("“rocket”")
    expect(page.locator(".bd-status")).to_contain_text("…")
    second.locator("#bd-prompt").fill("tulip")
    second.keyboard.press("Enter")
    expect(second.locator(".bd-status")).to_contain_text("waiting for the model")
    expect(second.locator("#queue")).to_contain_text("queue: 1/1")
    wait_for_live(second)
    second.close()


def test_an_order_of_another_kind_while_a_run_is_on_is_carried_out(page: Page) -> None:
    page.get_by_label("Or let Ada decide").check()
    expect(page.locator(".bd-edited")).to_contain_text("Ada decided the schedule.")
    expect(page.locator(".bd-status p")).to_contain_text(re.compile("BlockDance|fewer steps"))  # it is being drawn
    page.get_by_role("button", name="octopus").click()
    expect(page.locator(".bd-status p")).to_contain_text("“octopus”, seed 0")


def test_the_stop_button_ends_a_run_and_the_page_stays(page: Page) -> None:
    page.get_by_text("Model and sampling").click()
    page.locator("[name=steps]").fill("97")
    page.keyboard.press("Enter")
    expect(page.locator(".bd-status")).to_contain_text("plain sampler …")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".bd-status")).to_contain_text("Stopped.")
    page.get_by_role("button", name="rocket").click()
    expect(page.locator(".bd-status")).to_contain_text("“rocket”")


def test_closing_the_tab_stops_the_run_and_frees_the_model(server: Server, page: Page, calls: Calls) -> None:
    page.get_by_text("Model and sampling").click()
    page.locator("[name=steps]").fill("99")
    page.keyboard.press("Enter")
    expect(page.locator(".bd-status")).to_contain_text("plain sampler …")
    page.close()
    assert server.engine._model.acquire(timeout=PATIENCE_MS / 1000)
    server.engine._model.release()
    assert 0 < calls.total < 99


def test_a_style_is_chosen_kept_and_dropped(page: Page) -> None:
    expect(page.locator(".bd-styles")).to_be_hidden()
    page.get_by_role("button", name="More subjects, three styles").click()
    expect(page.locator("#bd-prompt")).to_have_value("fluent red apple")
    wait_for_live(page)
    styles, prompt = page.get_by_role("group", name="Style"), page.locator("#bd-prompt")
    styles.get_by_role("button", name="noto").click()
    expect(prompt).to_have_value("noto red apple")
    prompt.fill("guitar")
    prompt.press("Enter")
    expect(page.locator(".bd-status")).to_contain_text("“noto guitar”")
    expect(styles.get_by_role("button", name="noto")).to_have_attribute("aria-pressed", "true")
    styles.get_by_role("button", name="noto").click()
    expect(page.locator(".bd-status")).to_contain_text("“guitar”")
    page.get_by_text("Words the model knows").click()
    expect(page.locator(".bd-words p")).to_contain_text("guitar")
    styles.get_by_role("button", name="crown").click()
    expect(page.locator(".bd-status")).to_contain_text("“crown”")
    page.locator(".bd-chips").get_by_role("button", name="rocket").click()  # what ships is of the first model
    expect(page.locator(".bd-styles")).to_be_hidden()
    expect(page.locator(".bd-words p")).not_to_contain_text("guitar")


def test_a_number_beyond_its_range_is_clamped_and_told(page: Page) -> None:
    page.get_by_text("Model and sampling").click()
    page.locator("[name=steps]").fill("1000")
    page.keyboard.press("Enter")
    expect(page.locator(".bd-notices")).to_contain_text("steps must be an integer in [1, 100], got 1000; 100 is used.")
    page.get_by_role("button", name="rocket").click()


def test_a_model_out_of_reach_is_a_toast_and_the_page_stays(page: Page) -> None:
    page.get_by_text("Model and sampling").click()
    page.locator("[name=model]").select_option("dit-xl-2-256")
    expect(page.locator(".toast-body")).to_contain_text("facebook/DiT-XL-2-256 is not on this machine")
    expect(page.locator(".toast-body")).to_have_count(1)
    page.locator("#bd-prompt").focus()
    expect(page.locator("[name=model]")).to_have_value("demo")
    expect(page.locator(".bd-status")).to_contain_text("“red apple”")


def test_the_planner_chooses_a_schedule_and_the_page_draws_it(page: Page) -> None:
    page.locator("#bd-target").fill("1.6")
    page.get_by_role("button", name="Plan", exact=True).click()
    told = page.locator(".bd-planner p")
    expect(told).to_contain_text("Planned: 1.6")
    expect(told).to_contain_text("for nine pictures in ten")
    expect(page.locator(".bd-edited")).to_contain_text("The planner chose the schedule.")
    expect(page.locator(".bd-status p")).to_contain_text("computed live")
    schedule = page.locator(".bd-plan").inner_text().split("Schedule ")[1].rstrip(".")
    expect(page).to_have_url(re.compile(f"s={schedule}"))
    assert Schedule.parse(schedule, 12).ideal_speedup(14) >= 1.6
    page.get_by_role("button", name="Back to the sliders").click()
    expect(told).to_be_empty()


def test_the_planner_refuses_what_it_cannot_reach(page: Page) -> None:
    page.locator("#bd-target").fill("40")
    page.get_by_role("button", name="Plan", exact=True).click()
    expect(page.get_by_text("target_speedup must be above 1 and at most").first).to_be_visible()
    expect(page.locator(".bd-edited")).to_be_hidden()


def test_ada_decides_and_the_page_draws_what_it_decided(page: Page, server: Server, browser: Browser) -> None:
    page.get_by_label("Or let Ada decide").check()
    told = page.locator(".bd-ada p")
    expect(told).to_contain_text("Decided at step 12:")
    expect(page.locator(".bd-edited")).to_contain_text("Ada decided the schedule.")
    expect(page.locator(".bd-status p")).to_contain_text("computed live")
    schedule = page.locator(".bd-plan").inner_text().split("Schedule ")[1].rstrip(".")
    assert schedule.startswith("f" * 11 + "c")
    expect(page).to_have_url(re.compile(f"s={schedule}&ada=0.5"))
    page.locator("[data-map]").hover(position={"x": 700, "y": 335})
    expect(page.locator(".bd-tip")).to_contain_text("Ada: cache with probability")
    again = opened(browser, page.url)
    expect(again.locator(".bd-ada p")).to_have_text(told.inner_text())
    again.close()
    page.locator("[name=saving]").fill("0.8")
    expect(page.locator(".bd-plan")).not_to_contain_text(schedule)
    expect(told).to_contain_text("Decided at step 12:")
    more = page.locator(".bd-plan").inner_text().split("Schedule ")[1]
    assert more.count("r") > schedule.count("r")
    page.get_by_role("button", name="octopus").click()
    expect(page.locator(".bd-status p")).to_contain_text("“octopus”, seed 0")
    expect(page.get_by_label("Or let Ada decide")).to_be_checked()
    slide(page, "interval", 3)
    expect(page.get_by_label("Or let Ada decide")).not_to_be_checked()
    expect(page.locator(".bd-edited")).to_be_hidden()


def test_ada_draws_two_prompts_side_by_side_with_their_schedules(page: Page) -> None:
    page.get_by_role("button", name="Let Ada draw both").click()
    figures = page.locator(".bd-pair figure")
    expect(figures).to_have_count(2)
    for figure in figures.all():
        expect(figure).to_contain_text("of 18 decided steps reuse")
        expect(figure).to_contain_text("LPIPS")
    simple, complex_one = (int(figure.inner_text().split(" of 18 decided")[0].split()[-1]) for figure in figures.all())
    assert simple > complex_one
    page.get_by_label("A simple prompt").fill(" ")
    page.get_by_role("button", name="Let Ada draw both").click()
    expect(page.get_by_text("Type two prompts.").first).to_be_visible()


def test_the_comparison_with_rivals_is_on_the_page_and_says_who_wins(page: Page) -> None:
    page.locator("[data-part=tradeoff]").scroll_into_view_if_needed()
    compared = page.locator(".bd-compared")
    expect(compared.locator("li")).to_have_count(4)
    told = json.loads(CURVES.read_text())["steps"]
    for steps in told:
        compared.get_by_role("button", name=f"{steps} steps").click()
        expect(compared.locator("li").first).to_have_text(told[steps]["verdicts"][0])
        names = page.evaluate("document.querySelector('[data-plot=compared]').data.map(({name}) => name)")
        assert {"fewer-steps", "blockdance", "first-block-cache"} <= set(names)


def test_the_dots_of_the_trade_off_are_a_list_that_keys_reach(page: Page) -> None:
    page.locator("[data-part=tradeoff]").scroll_into_view_if_needed()
    page.get_by_text("The dots as a list").click()
    runs = page.locator(".bd-dots button")
    expect(runs).to_have_count(24)
    fastest = runs.last
    text = fastest.inner_text()
    fastest.press("Enter")
    expect(page.locator(".bd-plan")).to_contain_text(f"Schedule {text.split(',')[0]}.")
