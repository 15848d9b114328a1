"""Leave a pipeline as it was, whatever others do to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """Inside, attributes may be set on the pipeline and on its transformer's modules; afterwards they are as they were."""
    things = [pipe, *pipe.transformer.modules()]
    before = [(thing, dict(vars(thing)), dict(vars(thing).get("_modules", {}))) for thing in things]
    try:
        yield
    finally:
        for thing, state, children in before:
            vars(thing).clear()
            vars(thing).update(state)
            if children:
                state["_modules"].clear()
                state["_modules"].update(children)
