"""Take the README's screenshot: `python -m tests.screenshot assets/screenshot.png`."""

import sys

from playwright.sync_api import expect, sync_playwright

from analysis.browser import launch_chromium
from tests.serving import serving
from tests.test_page import PATIENCE_MS


def main() -> None:
    with serving() as server, sync_playwright() as driver:
        browser = launch_chromium(driver)
        if browser is None:
            sys.exit("error: no Chromium on this machine; run `playwright install chromium`")
        page = browser.new_page(viewport={"width": 1360, "height": 1180})
        page.goto(server.url)
        expect(page.locator(".bd-status")).to_contain_text("shipped with the page", timeout=PATIENCE_MS)
        expect(page.locator(".bd-scrubber output")).to_contain_text("final picture", timeout=PATIENCE_MS)
        page.wait_for_timeout(1000)
        page.screenshot(path=sys.argv[1])


if __name__ == "__main__":
    main()
