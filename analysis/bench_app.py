"""The app's own seconds: from its start to an answering page, and a comparison it remembers. Knows only its HTTP API."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from tqdm import tqdm

from analysis.experiment import Request
from analysis.records import ROOT, BenchError, Record
from analysis.stopwatch import seconds_of, spread
from blockdance import ReuseConfig

APP = ROOT / "app.py"
STARTS = 3
PATIENCE_SECONDS = 180.0
"""How long the app may take to answer."""
POLL_SECONDS = 0.05


def require_app() -> None:
    """Raise BenchError if there is no app to start."""
    if not APP.exists():
        raise BenchError(f"{APP.name} is missing; leave `app` out with --only")


def measure_app(request: Request, cutoff_block: int, repeats: int) -> Record:
    """Start the app a few times; ask the last one the same comparison again and again.

    Raises:
        BenchError: the app ended, or did not answer in time.
    """
    starts = []
    for start in tqdm(range(STARTS), desc="app", unit="start"):
        with running_app() as app:
            starts.append(app.start_seconds)
            if start == STARTS - 1:
                first, *remembered = ask(app.url, arguments(request, cutoff_block), 1 + repeats)
    return {
        "starts": STARTS,
        **spread("start_seconds", starts),
        "first_seconds": first,
        "repeats": repeats,
        **spread("remembered_seconds", remembered),
    }


def arguments(request: Request, cutoff_block: int) -> dict[str, Any]:
    """The arguments of the app's `/compare` for the default window."""
    config = ReuseConfig(cutoff_block=cutoff_block)
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "reuse_interval": config.reuse_interval,
        "cutoff_block": cutoff_block,
        "window_start": config.window_start,
        "window_end": config.window_end,
    }


def ask(url: str, comparison: dict[str, Any], times: int) -> list[float]:
    """Seconds of the same comparison, asked `times` times; the first has to be computed."""
    from gradio_client import Client

    client = Client(url, verbose=False)
    return [seconds_of(lambda: client.predict(**comparison, api_name="/compare")) for _ in range(times)]


@dataclass(frozen=True)
class Running:
    """The app in a process of its own."""

    url: str
    start_seconds: float
    """From its start to an answering page."""
    pid: int


@contextmanager
def running_app() -> Iterator[Running]:
    """Start the app, and stop it in the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, APP.name],
            cwd=ROOT,
            env=os.environ | {"GRADIO_SERVER_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_page(url, process, output)
            yield Running(url, time.perf_counter() - start, process.pid)
        finally:
            stop(process)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(url: str, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    """Return when the page and its config are there; raise BenchError if the process ends or takes too long."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while not (answers(url) and answers(f"{url}config")):
        if process.poll() is not None:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
            raise BenchError(f"{APP.name} ended with exit code {process.returncode} before it answered: {last}")
        if time.perf_counter() > deadline:
            raise BenchError(f"{APP.name} did not answer within {PATIENCE_SECONDS:.0f} seconds")
        time.sleep(POLL_SECONDS)


def answers(url: str) -> bool:
    """Whether a GET gives status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, by force if it does not listen."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
