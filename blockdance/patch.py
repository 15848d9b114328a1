"""Make a model and its scheduler report to the session they are called in, by swapping their classes inside a `with`.

A swapped object looks up who is concerned; where nobody is, it behaves as its own class does. So nothing of a run is ever kept
on the model, and threads that share a model do not see each other.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Protocol

from diffusers.hooks import _helpers as diffusers_helpers
from torch import nn

from blockdance import presence
from blockdance.presence import ACTIVE
from blockdance.swap import derived, is_swapped

__all__ = [
    "ACTIVE", "CURRENT", "NAME", "applied_class", "applied_to", "block_class", "in_a_session", "scheduler_class",
    "transformer_class",
]  # fmt: skip


class RunsBlocks(Protocol):
    """What handles the blocks of the call that is on."""

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(module, *args, **kwargs)`, or what is in its place."""


class RunsModel(Protocol):
    """What `apply_block_dance` put on a transformer."""

    def run_model(
        self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """`run(model, *args, **kwargs)`, called from `frame`, or what is in its place."""

    def inside(self, name: str, **where: Any) -> Any:
        """A context in which calls belong to the branch `name`."""

    def reset(self) -> None:
        """The next call begins a run."""


NAME: ContextVar[tuple[int, str] | None] = ContextVar("blockdance_branch", default=None)
"""What the pipeline calls the branch of the calls that come now, and of which transformer."""
CURRENT: ContextVar[RunsBlocks | None] = ContextVar("blockdance_call", default=None)
"""What handles the blocks of the call that is on in this thread or task."""


@functools.cache
def block_class(cls: type[nn.Module]) -> type:
    """A block that asks the call it is part of."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = CURRENT.get()
        if current is None:
            return cls.__call__(self, *args, **kwargs)
        return current.run_block(self, cls.__call__, args, kwargs)

    made = derived(cls, {"__call__": __call__})
    _register_with_guiders(cls, made)
    return made


def _register_with_guiders(cls: type, made: type) -> None:
    """diffusers' guiders that skip layers look a block's exact class up in a registry."""
    registry = getattr(diffusers_helpers, "TransformerBlockRegistry", None)
    if registry is None:
        return
    try:
        known = registry.get(cls)
    except ValueError:
        return
    before = known._cls
    registry.register(made, known)
    known._cls = before  # `register` writes the class into what both share


def in_a_session(transformer: Any) -> bool:
    """Whether it is inside `accelerate`, `observe` or `record` anywhere."""
    return is_swapped(transformer) and not applied_to(transformer)


@functools.cache
def transformer_class(cls: type[nn.Module]) -> type:
    """A transformer whose calls go through the session they belong to."""

    @contextmanager
    def cache_context(self: Any, name: str, **where: Any) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(cls.cache_context(self, name, **where))  # type: ignore[attr-defined]
            stack.callback(NAME.set, NAME.get())  # not by a token: a generator may leave in another context
            NAME.set((id(self), name))
            yield

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = presence.calling(self, (args, kwargs))
        if session is None:
            return cls.__call__(self, *args, **kwargs)
        return session.run_model(cls.__call__, self, args, kwargs, sys._getframe(1))

    contexts = {"cache_context": cache_context} if hasattr(cls, "cache_context") else {}
    return derived(cls, {"__call__": __call__} | contexts)


def applied_class(applied: RunsModel) -> Callable[[type], type]:
    """Makes the class of a transformer whose calls go through `applied`, which the class itself holds."""

    def make(cls: type) -> type:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return applied.run_model(cls.__call__, self, args, kwargs, sys._getframe(1))

        @contextmanager
        def cache_context(self: Any, name: str, **where: Any) -> Iterator[None]:
            with ExitStack() as stack:
                if hasattr(cls, "cache_context"):
                    stack.enter_context(cls.cache_context(self, name, **where))
                stack.enter_context(applied.inside(name, **where))
                yield

        def _reset_stateful_cache(self: Any, recurse: bool = True) -> None:
            if hasattr(cls, "_reset_stateful_cache"):
                cls._reset_stateful_cache(self, recurse)
            applied.reset()

        members = {"__call__": __call__, "cache_context": cache_context, "_reset_stateful_cache": _reset_stateful_cache}
        return derived(cls, {"blockdance_applied": applied} | members)

    return make


def applied_to(transformer: Any) -> Any:
    """What `apply_block_dance` put on the transformer, if anything."""
    return getattr(type(transformer), "blockdance_applied", None)


def scheduler_class(scheduler: Any) -> Callable[[type], type]:
    """Makes the class of a scheduler that tells its session when a run begins and when a step ends.

    Args:
        scheduler: says which of the methods there are; it may answer them by `__getattr__`, as a proxy does.
    """
    names = tuple(name for name in ("set_timesteps", "set_begin_index", "step") if hasattr(scheduler, name))
    return functools.partial(_scheduler_class, names=names)


@functools.cache
def _scheduler_class(cls: type, names: tuple[str, ...]) -> type:
    def told(name: str) -> Any:
        original = getattr(cls, name, None)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            session = presence.stepping(self, begins=name != "step")
            result = original(self, *args, **kwargs) if original else cls.__getattr__(self, name)(*args, **kwargs)  # type: ignore[attr-defined]
            if session is not None:
                getattr(session, f"after_{name}")(sys._getframe(1), args, kwargs)
            return result

        return functools.wraps(original)(method) if original else method

    return derived(cls, {name: told(name) for name in names})
