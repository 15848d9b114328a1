"""The page on a free port of this machine, for as long as a test needs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from analysis.metrics import shift_tolerant_lpips
from app.engine import Engine
from app.handlers import Handlers
from app.models import Models
from app.page import build_page, serve


@dataclass(frozen=True)
class Server:
    """A running page and what is behind it."""

    url: str
    handlers: Handlers

    @property
    def engine(self) -> Engine:
        """Of the model in the box."""
        return self.handlers.models.engine(self.handlers.models.first)


@contextmanager
def serving() -> Iterator[Server]:
    handlers = Handlers(Models(shift_tolerant_lpips()))
    page = build_page(handlers)
    serve(page, prevent_thread_lock=True, inbrowser=False, quiet=True)
    try:
        yield Server(page.local_url, handlers)
    finally:
        page.close(verbose=False)
