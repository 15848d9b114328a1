"""A browser to look at the page with: Playwright's own Chromium, or the machine's."""

import shutil
from pathlib import Path

import plotly.graph_objects as go
from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def launch_chromium(driver: Playwright) -> Browser | None:
    """Playwright's own Chromium, else the machine's, else None."""
    own = Path(driver.chromium.executable_path)
    found = str(own) if own.exists() else next(filter(None, map(shutil.which, NAMES)), None)
    return driver.chromium.launch(executable_path=found, args=["--no-sandbox"]) if found else None


def write_png(figure: go.Figure, file: Path, width: int, height: int) -> bool:
    """Write a figure as a picture; False if there is no browser to draw it."""
    with sync_playwright() as driver:
        browser = launch_chromium(driver)
        if browser is None:
            return False
        page = browser.new_page(viewport={"width": width, "height": height})
        shaped = go.Figure(figure).update_layout(width=width - 20, height=height - 20)
        page.set_content(shaped.to_html(include_plotlyjs=True))
        page.locator(".main-svg").first.wait_for()
        page.screenshot(path=file)
        browser.close()
    return True
