"""Seconds of whole runs of one request, interleaved: the baseline, schedules, and fewer steps."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.estimates import after_step
from analysis.experiment import Request, sample, with_sampler
from analysis.speedup import speedup_of
from analysis.stopwatch import interleaved
from blockdance import Schedule, accelerate
from blockdance.storage import rule_named

Timing = dict[str, Any]


def time_interleaved(
    pipe: Any,
    request: Request,
    rivals: Sequence[Schedule | int],
    rounds: int,
    check: Callable[[], None] | None = None,
    storage: str = "latest",
) -> dict[Schedule | int, Timing]:
    """Time the plain run of a request against schedules, and against plain runs with other numbers of steps.

    Args:
        pipe: the pipeline.
        request: what is drawn.
        rivals: schedules, or numbers of steps of the plain sampler.
        rounds: how often each is timed, >= 1.
        check: called after every step; what it raises ends the timing.
        storage: what the schedules' reuse steps start from, a key of `blockdance.storage.RULES`.

    Returns:
        For each rival what `timing` says of it.
    """
    view, rule = with_sampler(pipe, request.sampler), rule_named(storage)

    def runner(rival: Schedule | int | None) -> Callable[[], None]:
        asked = replace(request, steps=rival) if isinstance(rival, int) else request

        def run() -> None:
            with accelerate(view, rival, storage=rule) if isinstance(rival, Schedule) else nullcontext():
                sample(view, asked)

        return run

    with after_step(view, lambda *_: check()) if check else nullcontext():
        seconds = interleaved({rival: runner(rival) for rival in (None, *rivals)}, rounds, request.prompt)
    return {rival: timing(seconds[rival], seconds[None]) for rival in rivals}


def timing(ours: Sequence[float], baseline: Sequence[float]) -> Timing:
    """Medians of the seconds over the rounds, and the speedup with its quartiles."""
    return {
        "rounds": len(ours),
        "seconds": float(np.median(ours)),
        "baseline_seconds": float(np.median(baseline)),
        **speedup_of(baseline, ours),
    }
