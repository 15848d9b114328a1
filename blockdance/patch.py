"""Make a model and its scheduler report to the active session, by swapping their classes inside a `with`.

A swapped object looks its session up in a context variable; without one it behaves as its own class does. So nothing of
a run is ever kept on the model, and threads that share a model do not see each other.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from blockdance.errors import SessionError

if TYPE_CHECKING:
    from blockdance.apply import Applied
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


def in_a_session(transformer: Any) -> bool:
    """Whether it is inside `accelerate`, `observe` or `record` anywhere."""
    return isinstance(transformer, _Swapped) and not applied_to(transformer)


@functools.cache
def transformer_class(cls: type[nn.Module]) -> type:
    """A transformer whose calls go through the session that owns it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        for session in ACTIVE.get():
            if session.transformer is self:
                return session.run_model(cls.__call__, self, args, kwargs)
        return cls.__call__(self, *args, **kwargs)

    return _derive(cls, {"__call__": __call__})


def applied_class(applied: "Applied") -> Callable[[type], type]:
    """Makes the class of a transformer whose calls go through `applied`, which the class itself holds."""

    def make(cls: type) -> type:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return applied.run_model(cls.__call__, self, args, kwargs)

        @contextmanager
        def cache_context(self: Any, name: str, **where: Any) -> Iterator[None]:
            with ExitStack() as stack:
                if hasattr(cls, "cache_context"):
                    stack.enter_context(cls.cache_context(self, name, **where))
                stack.enter_context(applied.session().inside(name, **where))
                yield

        def _reset_stateful_cache(self: Any, recurse: bool = True) -> None:
            if hasattr(cls, "_reset_stateful_cache"):
                cls._reset_stateful_cache(self, recurse)
            applied.reset()

        members = {"__call__": __call__, "cache_context": cache_context, "_reset_stateful_cache": _reset_stateful_cache}
        return _derive(cls, {"blockdance_applied": applied} | members)

    return make


def applied_to(transformer: Any) -> "Applied | None":
    """What `apply_block_dance` put on the transformer, if anything."""
    return getattr(type(transformer), "blockdance_applied", None)


def check_free(transformer: Any) -> None:
    """Raise SessionError if something else decides which of the transformer's blocks run."""
    if applied_to(transformer):
        raise SessionError("this transformer is accelerated already by apply_block_dance or enable_cache; remove that first")
    if getattr(transformer, "is_cache_enabled", False):
        raise SessionError(f"{type(transformer).__name__} has another cache enabled; call its disable_cache first")


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


def swap_in(thing: Any, make_class: Callable[[type], type]) -> None:
    """Swap the class of `thing`, or count one more user of the swapped one."""
    with _users_lock:
        _users[thing] = _users.get(thing, 0) + 1
        if _users[thing] == 1:
            thing.__class__ = make_class(type(thing))


def swap_out(thing: Any) -> None:
    """One user less; the last one, in any thread, puts the original class back."""
    with _users_lock:
        _users[thing] -= 1
        if not _users[thing]:
            del _users[thing]
            thing.__class__ = original_class(type(thing))


@contextmanager
def swapped(thing: Any, make_class: Callable[[type], type]) -> Iterator[None]:
    """`swap_in`, and `swap_out` whatever happens."""
    swap_in(thing, make_class)
    try:
        yield
    finally:
        swap_out(thing)
