"""Many visitors on one app: how long what is shipped takes while another's run is on, and memory over many runs."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import psutil
from playwright.sync_api import sync_playwright
from tqdm import tqdm

from analysis.bench_app import arguments, running_app
from analysis.browser import launch_chromium
from analysis.experiment import Request
from analysis.records import BenchError, Record
from analysis.stopwatch import seconds_of, spread

VISITORS = 20
ROUNDS = 5
"""How often every visitor asks for the page and every file of the atlas."""
RUNS = 300
RUN_STEPS = 10
SAMPLES = 6
"""Memory is read so many times, evenly over the runs."""
SWAPS = """async () => {
  const page = document.querySelector('.bd'), canvas = page.querySelector('[data-picture=variant]');
  const drawn = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const move = (name, value) => { const s = page.querySelector(`.bd-sliders [name=${name}]`); s.value = value; s.oninput(); };
  const took = [];
  for (const [start, end] of [[0.4, 0.95], [0, 1]]) {
    move('start', start); move('end', end); await drawn();
    for (const interval of [2, 3, 4]) { move('interval', interval); await drawn();
      for (const cutoff of [3, 6, 9, 12]) {
        const before = canvas.dataset.tile, from = performance.now();
        move('cutoff', cutoff);
        while (canvas.dataset.tile === before || canvas.classList.contains('stale')) await drawn();
        took.push((performance.now() - from) / 1000);
      } } }
  return took;
}"""
"""Seconds from a move of the cutoff slider to the new picture, for every setting of the atlas."""


def measure_visitors(request: Request, cutoff_block: int) -> Record:
    """Start the app once, browse it with many visitors while one draws, then draw many times and read its memory.

    Raises:
        BenchError: the app ended, did not answer in time, or there is no browser.
    """
    with running_app() as app:
        asked = arguments(request, cutoff_block)
        swaps = measure_swaps(app.url)
        alone = browse(app.url)
        with drawing(app.url, asked | {"steps": 100}):
            busy = browse(app.url)
        memory = memory_over_runs(app.url, app.pid, asked | {"steps": RUN_STEPS})
    return {
        "visitors": VISITORS,
        "requests": len(busy),
        "swaps": len(swaps),
        **spread("swap_seconds", swaps),
        "swap_seconds_slowest": max(swaps),
        **spread("alone_seconds", alone),
        "alone_seconds_95": float(np.quantile(alone, 0.95)),
        **spread("busy_seconds", busy),
        "busy_seconds_95": float(np.quantile(busy, 0.95)),
        "runs": RUNS,
        "run_steps": RUN_STEPS,
        "resident_bytes": memory,
    }


def measure_swaps(url: str) -> list[float]:
    """Seconds of every swap, in a browser.

    Raises:
        BenchError: no browser.
    """
    with sync_playwright() as driver:
        browser = launch_chromium(driver)
        if browser is None:
            raise BenchError("no Chromium on this machine: install it, or run `playwright install chromium`")
        page = browser.new_page(viewport={"width": 1360, "height": 1000}, reduced_motion="reduce")
        page.goto(url)
        page.wait_for_selector("[data-picture=variant][data-tile]:not(.stale)")
        page.evaluate(SWAPS)  # once to have every image decoded, as a visitor's second move has
        seconds: list[float] = page.evaluate(SWAPS)
        browser.close()
    return seconds


def browse(url: str) -> list[float]:
    """Seconds of every request of all visitors, who ask at the same time for the page and the files of the atlas."""
    manifest = json.loads(fetched(f"{url}atlas/manifest.json"))
    files = sorted({ref["src"] for scene in manifest["scenes"] for ref in pictures_of(scene)})
    wanted = [url, f"{url}atlas/manifest.json", *(f"{url}atlas/{file}" for file in files)] * ROUNDS

    def visit(_: int) -> list[float]:
        return [seconds_of(lambda address=address: fetched(address)) for address in wanted]  # type: ignore[misc]

    with ThreadPoolExecutor(VISITORS) as pool:
        return [seconds for visitor in pool.map(visit, range(VISITORS)) for seconds in visitor]


def pictures_of(scene: Record) -> Iterator[Record]:
    """Where the pictures of a scene are."""
    for run in [scene["baseline"], *scene["runs"], *scene["controls"]]:
        yield run["picture"]
    yield scene["baseline"]["previews"]


def fetched(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as response:
        body: bytes = response.read()
        return body


@contextmanager
def drawing(url: str, asked: Record) -> Iterator[None]:
    """Somebody draws one new seed after the other, as long as this lasts."""
    from gradio_client import Client

    client, over = Client(url, verbose=False), threading.Event()

    def draw() -> None:
        for seed in count(1000):
            if over.is_set():
                return
            client.predict(**(asked | {"seed": seed}), api_name="/compare")

    artist = threading.Thread(target=draw)
    artist.start()
    time.sleep(1)
    try:
        yield
    finally:
        over.set()
        artist.join()


def memory_over_runs(url: str, pid: int, asked: Record) -> list[dict[str, Any]]:
    """Resident bytes of the app before, and after ever more runs that differ."""
    from gradio_client import Client

    client, process = Client(url, verbose=False), psutil.Process(pid)
    read: list[dict[str, Any]] = [{"runs": 0, "bytes": process.memory_info().rss}]
    for run in tqdm(range(1, RUNS + 1), desc="memory", unit="run"):
        client.predict(**(asked | {"seed": run}), api_name="/compare")
        if run % (RUNS // SAMPLES) == 0:
            read.append({"runs": run, "bytes": process.memory_info().rss})
    return read
