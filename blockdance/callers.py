"""Where a call of the transformer comes from: the loop that samples, or something that the loop calls back."""

from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FrameType

Site = tuple[tuple[CodeType, int], ...]
"""The functions from the one that calls the transformer out to the loop of the run, and the place in each."""

Caller = tuple[int, CodeType]
"""A function while it is open: the address of its frame, and its code."""
MOST_CALLERS = 64
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
    """Tells callbacks from loops where no scheduler says when a run begins.

    A callback is called by a function that also calls the transformer itself, in turns with it. Frames are known by their
    addresses and functions, and not kept.
    """

    def __init__(self) -> None:
        self._calls: dict[Caller, int] = {}
        """By function that called the transformer itself, how often."""
        self._seen: dict[Site, tuple[Caller, int]] = {}
        """By place of a call from within such a function: that function, and how often it had called by then."""
        self._callbacks: set[Site] = set()

    def site(self, frame: FrameType) -> Site | None:
        """Of a call from `frame`; None for one from a callback."""
        site = ((frame.f_code, frame.f_lasti),)
        outer = self._caller_around(frame)
        if outer is not None:
            before = self._seen.get(site)
            self._seen[site] = outer, self._calls[outer]
            if before is not None and before[0] == outer and before[1] < self._calls[outer]:
                self._callbacks.add(site)
        if site in self._callbacks:
            return None
        if len(self._calls) >= MOST_CALLERS:
            self.clear()
        caller = id(frame), frame.f_code
        self._calls[caller] = self._calls.get(caller, 0) + 1
        return site

    def _caller_around(self, frame: FrameType) -> Caller | None:
        """The innermost function around this one that called the transformer itself."""
        outer = frame.f_back
        while outer is not None:
            if (id(outer), outer.f_code) in self._calls:
                return id(outer), outer.f_code
            outer = outer.f_back
        return None

    def clear(self) -> None:
        """Nothing is known of any function."""
        self._calls.clear()
        self._seen.clear()
        self._callbacks.clear()
