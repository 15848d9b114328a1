"""The page on a free port of this machine, for as long as a test needs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from analysis.metrics import shift_tolerant_lpips
from app.engine import Engine
from app.handlers import Handlers
from app.page import build_page, serve
from blockdance import load_demo_pipeline


@dataclass(frozen=True)
class Server:
    """A running page and what is behind it."""

    url: str
    handlers: Handlers


@contextmanager
def serving() -> Iterator[Server]:
    handlers = Handlers(Engine(load_demo_pipeline(), shift_tolerant_lpips()))
    page = build_page(handlers)
    serve(page, prevent_thread_lock=True, inbrowser=False, quiet=True)
    try:
        yield Server(page.local_url, handlers)
    finally:
        page.close(verbose=False)
