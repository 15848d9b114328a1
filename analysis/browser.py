"""A browser to look at the page with: Playwright's own Chromium, or the machine's."""

import shutil
from pathlib import Path

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def launch_chromium(driver: Playwright) -> Browser | None:
    """Playwright's own Chromium, else the machine's, else None."""
    own = Path(driver.chromium.executable_path)
    found = str(own) if own.exists() else next(filter(None, map(shutil.which, NAMES)), None)
    return driver.chromium.launch(executable_path=found, args=["--no-sandbox"]) if found else None
