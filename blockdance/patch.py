"""Make a model and its scheduler report to the active session, by swapping their classes inside a `with`.

A swapped object looks its session up in a context variable; without one it behaves as its own class does. So nothing of
a run is ever kept on the model, and threads that share a model do not see each other.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from blockdance.session import Session

ACTIVE: ContextVar[tuple["Session", ...]] = ContextVar("blockdance_sessions", default=())
"""The sessions of the current thread or task, innermost last; more than one only for different pipelines."""

_users: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_users_lock = threading.Lock()


class _Swapped:
    """Mixed into every swapped class; copies and pickles come out as the original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        _, arguments, *rest = reduced
        return object.__new__, (original_class(type(self)), *arguments[1:]), *rest


def original_class(cls: type) -> type:
    """The class before it was swapped; any other class is returned as it is."""
    return cls.__mro__[2] if issubclass(cls, _Swapped) else cls


def _derive(cls: type, members: dict[str, Any]) -> type:
    """A subclass of `cls` that carries its name, so that saved configs and messages stay the same."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Swapped, cls), names | members)


@functools.cache
def block_class(cls: type[nn.Module]) -> type:
    """A block whose calls go through the session that owns it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        for session in ACTIVE.get():
            index = session.index_of.get(id(self))
            if index is not None:
                return session.run_block(index, cls.__call__, self, args, kwargs)
        return cls.__call__(self, *args, **kwargs)

    return _derive(cls, {"__call__": __call__})


@functools.cache
def transformer_class(cls: type[nn.Module]) -> type:
    """A transformer whose calls go through the session that owns it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        for session in ACTIVE.get():
            if session.transformer is self:
                return session.run_model(cls.__call__, self, args, kwargs)
        return cls.__call__(self, *args, **kwargs)

    return _derive(cls, {"__call__": __call__})


@functools.cache
def scheduler_class(cls: type) -> type:
    """A scheduler that tells its session when a run begins and when a step ends."""

    def told(name: str) -> Any:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            for session in ACTIVE.get():
                if session.scheduler is self:
                    getattr(session, f"after_{name}")(*args, **kwargs)
            return result

        return method

    names = [name for name in ("set_timesteps", "set_begin_index", "step") if hasattr(cls, name)]
    return _derive(cls, {name: told(name) for name in names})


@contextmanager
def swapped(thing: Any, make_class: Any) -> Iterator[None]:
    """Swap the class of `thing`; the last of several users, in any thread, puts the original back."""
    with _users_lock:
        _users[thing] = _users.get(thing, 0) + 1
        if _users[thing] == 1:
            thing.__class__ = make_class(type(thing))
    try:
        yield
    finally:
        with _users_lock:
            _users[thing] -= 1
            if not _users[thing]:
                del _users[thing]
                thing.__class__ = original_class(type(thing))
