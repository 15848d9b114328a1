"""Where sessions are in force: in the contexts that entered them, and wherever their scheduler begins a run.

A context variable alone is not enough: a streaming handler is resumed in another context every time, and a worker thread
has none of ours. A run is known by its scheduler, which every visitor has for himself; so the context in which a session's
scheduler begins a run is where the run's calls belong to the session.
"""

import threading
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import ReferenceType, ref

from torch import nn

from blockdance.errors import SessionError


class Present(Protocol):
    """A session, as it is looked for."""

    scheduler: Any
    run_number: int
    """Runs begun so far."""
    is_open: bool

    @property
    def is_running(self) -> bool:
        """Whether a run is on."""

    def has(self, transformer: nn.Module) -> bool:
        """Whether it is one of the session's."""

    def is_at(self, arguments: Any) -> bool:
        """Whether a call with these arguments can only be of the run that is on."""


ACTIVE: ContextVar[tuple[tuple[ReferenceType[Any], int], ...]] = ContextVar("blockdance_sessions", default=())
"""The sessions of the current context and the run that it knows of each; innermost last."""
_open: list[Any] = []
_open_lock = threading.Lock()


def enter(session: Present) -> None:
    """In force from now on, here."""
    with _open_lock:
        _open.append(session)
    session.is_open = True
    bind(session)


def leave(session: Present) -> None:
    """In force nowhere any more, whichever context this is."""
    session.is_open = False
    with _open_lock:
        _open.remove(session)
    ACTIVE.set(_others(session))


def bind(session: Present) -> None:
    """Calls of this context belong to the run that is on."""
    ACTIVE.set((*_others(session), (ref(session), session.run_number)))


def _others(session: Present) -> tuple[tuple[ReferenceType[Any], int], ...]:
    return tuple(pair for pair in ACTIVE.get() if (other := pair[0]()) is not None and other.is_open and other is not session)


def here() -> list[tuple[Any, int]]:
    """The open sessions of this context, each with its run that this context knows of."""
    return [(session, run) for one, run in ACTIVE.get() if (session := one()) is not None and session.is_open]


def opened_here(scheduler: Any) -> Any:
    """The session of this context that follows this scheduler, which a further part can join; None if there is none."""
    return next((session for session, _ in here() if session.scheduler is scheduler), None)


def calling(transformer: nn.Module, arguments: tuple[Any, Any]) -> Any:
    """The session that a call of this transformer belongs to; None for a plain call.

    A context that knows of an older run only has been overtaken by another one of the same session; its calls are plain. One
    that has seen no run begin, as it entered the session, may call in any. Of two sessions it is the one whose run is on.
    """
    idle = None
    for one, run in reversed(ACTIVE.get()):
        session = one()
        if session is not None and session.is_open and session.has(transformer) and run in (0, session.run_number):
            if session.is_running:
                return session
            idle = idle or session
    if idle is not None:
        return idle
    for session in list(_open):
        if session.has(transformer) and session.is_at(arguments):
            bind(session)
            return session
    return None


def stepping(scheduler: Any, begins: bool) -> Any:
    """The session that follows this scheduler, if there is one.

    Args:
        scheduler: which is called here.
        begins: whether the call begins a run.

    Raises:
        SessionError: two sessions do, and neither was entered here.
    """
    for one, run in reversed(ACTIVE.get()):
        session = one()
        if session is not None and session.is_open and session.scheduler is scheduler:
            return session if begins or run in (0, session.run_number) else None
    found = [session for session in list(_open) if session.scheduler is scheduler]
    if len(found) > 1:
        raise SessionError(
            f"{len(found)} sessions follow this pipeline's scheduler and none was entered in this context; give each visitor a "
            "pipeline of its own: the same components, and a scheduler of its own"
        )
    if found and not begins:
        bind(found[0])
    return found[0] if found else None
