"""Take the README's screenshots, light, dark and on a phone: `python -m tests.screenshot`."""

import sys
from typing import Any

from playwright.sync_api import expect, sync_playwright

from analysis.browser import launch_chromium
from tests.serving import serving
from tests.test_page import PATIENCE_MS, opened, wait_for_picture

SHOTS: dict[str, dict[str, Any]] = {
    "assets/screenshot.png": {"viewport": {"width": 1360, "height": 1330}},
    "assets/screenshot_dark.png": {"viewport": {"width": 1360, "height": 1330}, "color_scheme": "dark"},
    "assets/screenshot_narrow.png": {"viewport": {"width": 390, "height": 1625}},
}
"""Tall enough that the map is not cut."""


def main() -> None:
    with serving() as server, sync_playwright() as driver:
        browser = launch_chromium(driver)
        if browser is None:
            sys.exit("error: no Chromium on this machine; run `playwright install chromium`")
        expect.set_options(timeout=PATIENCE_MS)
        for path, context in SHOTS.items():
            page = opened(browser, server.url, **context)  # nothing plays: it stands at the last step
            wait_for_picture(page)
            expect(page.locator(".bd-scrubber output")).to_have_text("final picture")
            page.wait_for_timeout(1000)
            page.screenshot(path=path)
            page.close()


if __name__ == "__main__":
    main()
