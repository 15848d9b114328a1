"""The measured speedup: one estimator with its own interval; how a results file keeps it, and how a table tells it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.stopwatch import paired_ratios, spread

MEASURED = "speedup_measured"
"""What lines call it; its quartiles are under the same name with `_quartiles`, as `spread` puts them."""
EARLIER = "speedup_paired"
"""What lines of before 2026-11-26 call it, if they have it; their `speedup_measured`, a ratio of medians, is not read."""
RATIOS_ALONE = "speedup_quartiles"
"""Where such lines have the quartiles of the rounds' ratios and not their median."""
TOLD = "the median over rounds of the baseline's seconds over those of the same round (in brackets the quartiles)"
"""What the column of measured speedups holds."""
TOLD_ALONE = (
    "Where only the quartiles stand, the lines were written before the median of the ratios was kept, and are to be "
    "measured again."
)


@dataclass(frozen=True)
class Speedup:
    """A measured speedup: of the rounds' own ratios, the baseline's seconds over ours."""

    median: float | None
    """None where a line has the quartiles alone."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""

    def __str__(self) -> str:
        if self.median is None:
            return f"{self.low:.2f}x to {self.high:.2f}x"
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"

    def of(self, ideal: float) -> str:
        """The share of an ideal speedup that was reached, as a table's cell."""
        return "" if self.median is None else f"{self.median / ideal:.3f}"


def speedup_of(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """What a results file keeps: the median of the rounds' ratios, and the quartiles of the same ratios.

    Args:
        baseline: seconds of the plain run in every round.
        ours: seconds of the other run in the same rounds.
    """
    return spread(MEASURED, paired_ratios(baseline, ours))


def speedup_in(line: dict[str, Any]) -> Speedup:
    """The measured speedup of a line of a results file, whenever that was written; value and quartiles are of one estimator."""
    for name in (MEASURED, EARLIER):
        if f"{name}_quartiles" in line:
            return Speedup(line[name], *line[f"{name}_quartiles"])
    return Speedup(None, *line[RATIOS_ALONE])


def how_measured(lines: Sequence[dict[str, Any]]) -> str:
    """A caption's sentences about the columns of measured speedups, the controls' among them."""
    shown = [one for line in lines for one in (line, line.get("fewer_steps", line))]
    alone = any(speedup_in(one).median is None for one in shown)
    return f"*Measured* is {TOLD}." + (f" {TOLD_ALONE}" if alone else "")
