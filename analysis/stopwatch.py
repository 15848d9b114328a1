"""The project's one stopwatch: whole calls, interleaved, with medians and quartiles."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def now() -> float:
    """Seconds; waits for the device first, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time of one call in seconds."""
    start = now()
    run()
    return now() - start


def interleaved(
    runs: Mapping[Name, Callable[[], Any]], repeats: int, what: str = "", timed: Callable[[Any], float] = seconds_of
) -> dict[Name, list[float]]:
    """Seconds of every run in every round; each second round goes backwards (ABBA), which cancels a steady drift.

    Args:
        runs: what to call, by name.
        repeats: rounds, >= 1; every run is called once in each.
        what: label of the progress bar.
        timed: gives the seconds of a call; by default all of it counts.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    order = [name for turn in range(repeats) for name in (reversed(list(runs)) if turn % 2 else runs)]
    for name in tqdm(order, desc=what, unit="run"):
        seconds[name].append(timed(runs[name]))
    return seconds


def spread(name: str, values: Sequence[float]) -> dict[str, float | list[float]]:
    """The median of `values` under `name`, and `[lower, upper]` under `name`_quartiles."""
    lower, median, upper = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {name: median, f"{name}_quartiles": [lower, upper]}


def paired_ratios(ours: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Ours over the baseline, round by round."""
    return [our / base for our, base in zip(ours, baseline, strict=True)]
