"""Where a call of the transformer comes from: the loop that samples, or something that the loop calls back."""

from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FrameType

Site = tuple[tuple[int, int], ...]
"""The functions from the one that calls the transformer out to the loop of the run, by the addresses of their code, which
somebody must keep, and the place in each."""

TAKES_OVER = 2
"""Repeated calls in a row that make a function the one whose calls are the run's."""
RESUMED = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR
"""Of code that is entered from another place every time."""


class Loop:
    """The functions that were open when a run began; the innermost of them that is open at a call is the run's loop.

    It keeps their frames, and with them what they hold, until it is dropped; so no other frame is mistaken for one of them.
    """

    def __init__(self, frame: FrameType | None) -> None:
        self._frames: dict[int, FrameType] = {}
        self._codes: dict[int, CodeType] = {}
        while frame is not None:
            self._frames[id(frame)] = frame
            frame = frame.f_back

    def site(self, frame: FrameType | None) -> Site:
        """Of a call from `frame`."""
        places = []
        while frame is not None:
            code = frame.f_code
            self._codes[id(code)] = code
            places.append((id(code), frame.f_lasti))
            if id(frame) in self._frames or code.co_flags & RESUMED:
                break
            frame = frame.f_back
        return tuple(places)


def functions(site: Site) -> tuple[int, ...]:
    """Through which functions a call went; a callback is one more."""
    return tuple([code for code, _ in site])


class MainCaller:
    """The function whose calls of the transformer are a run's, where no scheduler says when a run begins.

    It is the first that calls for one branch at two timesteps, as a loop does. A callback comes in turns with it, so another
    function takes over only when it calls again and again with none of its calls in between, as the next loop does.
    """

    def __init__(self) -> None:
        self._codes: dict[int, CodeType] = {}
        self._main: CodeType | None = None
        self._other: CodeType | None = None
        self._repeats = 0

    def site(self, frame: FrameType) -> Site:
        """Of a call from `frame`; of two runs of one generator, each has its own."""
        code = frame.f_code
        self._codes[id(code)] = code
        of_generator = ((id(frame), 0),) if code.co_flags & RESUMED else ()
        return ((id(code), frame.f_lasti), *of_generator)

    def is_run(self, caller: CodeType, repeats: bool) -> bool:
        """Whether a call is one of a run.

        Args:
            caller: the function that calls.
            repeats: whether it has called for the same branch before, at another timestep.
        """
        if self._main is None or self._main is caller:
            self._main = caller if repeats else self._main
            self._other, self._repeats = None, 0
            return True
        self._repeats = repeats + (self._repeats if self._other is caller else 0)
        self._other = caller
        if self._repeats == TAKES_OVER:
            self._main = caller
        return self._main is caller
