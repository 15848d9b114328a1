"""Where a call of the transformer comes from: the loop that samples, or something that the loop calls back."""

from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FrameType

Site = tuple[tuple[CodeType, int], ...]
"""The functions from the one that calls the transformer out to the loop of the run, and the place in each."""

RESUMED = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR
"""Of code that is entered from another place every time."""


class Loop:
    """The functions that were open when a run began; the innermost of them that is open at a call is the run's loop.

    It keeps their frames, and with them what they hold, until it is dropped; so no other frame is mistaken for one of them.
    """

    def __init__(self, frame: FrameType | None) -> None:
        self._frames: dict[int, FrameType] = {}
        while frame is not None:
            self._frames[id(frame)] = frame
            frame = frame.f_back

    def site(self, frame: FrameType | None) -> Site:
        """Of a call from `frame`."""
        places = []
        while frame is not None:
            places.append((frame.f_code, frame.f_lasti))
            if id(frame) in self._frames or frame.f_code.co_flags & RESUMED:
                break
            frame = frame.f_back
        return tuple(places)


def functions(site: Site) -> tuple[CodeType, ...]:
    """Through which functions a call went; a callback is one more."""
    return tuple(code for code, _ in site)


class DirectCallers:
    """Functions that called the transformer themselves; what such a function calls back is no part of its loop.

    For where no scheduler tells when a run begins. Frames are known by their addresses and functions, and not kept.
    """

    def __init__(self) -> None:
        self._known: set[tuple[int, CodeType]] = set()

    def site(self, frame: FrameType) -> Site | None:
        """Of a call from `frame`; None for one from a callback."""
        outer = frame.f_back
        while outer is not None:
            if (id(outer), outer.f_code) in self._known:
                return None
            outer = outer.f_back
        if len(self._known) >= MOST_CALLERS:
            self._known.clear()
        self._known.add((id(frame), frame.f_code))
        return ((frame.f_code, frame.f_lasti),)

    def clear(self) -> None:
        """A run is over."""
        self._known.clear()


MOST_CALLERS = 64
