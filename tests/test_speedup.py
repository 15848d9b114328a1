"""The measured speedup: one estimator with its own interval, in every results file that the tables read, whenever written."""

import re
from pathlib import Path
from typing import Any

import pytest

from analysis.ada import ADA_RESULTS
from analysis.compare import COMPARE_RESULTS
from analysis.experiment import Request
from analysis.full_size import FULL_SIZE_RESULTS
from analysis.intervals import line_of, rivals_of
from analysis.points import points
from analysis.records import RESULTS, ROOT, Record, read_records
from analysis.speedup import TOLD_ALONE, Speedup, how_measured, speedup_in, speedup_of
from analysis.styles import STYLES_RESULTS
from analysis.tables_ada import curves
from analysis.tables_compare import by_steps
from analysis.timing import timing
from analysis.video import VIDEO_RESULTS
from blockdance import ReuseConfig

BASELINE, OURS = [2.0, 4.0, 9.0, 2.0, 3.0], [1.0, 1.0, 3.0, 2.0, 2.0]
"""Ratios 2, 4, 3, 1 and 1.5; the ratio of the medians is 1.5."""


def lines_with_a_speedup(file: Path) -> list[Record]:
    """Lines and their controls."""
    return [one for line in read_records(file) for one in (line, line.get("fewer_steps", {})) if "speedup_measured" in one]


def test_a_speedup_is_the_median_of_the_rounds_own_ratios_with_the_quartiles_of_the_same() -> None:
    assert speedup_in(speedup_of(BASELINE, OURS)) == Speedup(2.0, 1.5, 3.0)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_run_that_takes_a_multiple_in_every_round_has_that_share_of_the_speedup_and_of_its_quartiles(factor: float) -> None:
    one, other = timing(OURS, BASELINE), timing([factor * seconds for seconds in OURS], BASELINE)
    assert other["speedup_measured"] == pytest.approx(one["speedup_measured"] / factor)
    quartiles = [value / factor for value in one["speedup_measured_quartiles"]]
    assert other["speedup_measured_quartiles"] == pytest.approx(quartiles)


def test_a_timing_counts_the_baseline_over_ours_and_not_the_other_way_round() -> None:
    """Faster in every round: so is the median, and so are both quartiles."""
    found = timing(ours=[1.0, 1.0, 1.0], baseline=[2.0, 4.0, 6.0])
    assert found == {
        "rounds": 3, "seconds": 1.0, "baseline_seconds": 4.0, "speedup_measured": 4.0, "speedup_measured_quartiles": [3.0, 5.0],
    }  # fmt: skip


def test_a_line_and_its_control_hold_each_their_own_seconds_and_speedup() -> None:
    """Whatever is timed: nothing of the control stands in BlockDance's place, nor the other way round."""
    baseline = [4.0, 4.0]
    for rival in rivals_of(ReuseConfig(), Request("red apple"), 14):
        timings: dict[Any, Any] = {
            rival.schedule: timing([2.0, 2.0], baseline),
            rival.control.steps: timing([1.0, 1.0], baseline),
        }
        line = line_of(rival, timings, {"lpips": 0.1}, {"lpips": 0.2})
        assert (line["seconds"], line["speedup_measured"], line["lpips"]) == (2.0, 2.0, 0.1)
        fewer = line["fewer_steps"]
        assert (fewer["steps"], fewer["seconds"], fewer["speedup_measured"]) == (rival.control.steps, 1.0, 4.0)
        assert fewer["lpips"] == 0.2


def test_of_an_earlier_line_the_ratio_of_medians_is_never_read() -> None:
    earlier = {"speedup_measured": 9.0, "speedup_paired": 2.0, "speedup_paired_quartiles": [1.0, 3.0]}
    assert str(speedup_in(earlier)) == "2.00x (1.00 to 3.00)"
    alone = speedup_in({"speedup_measured": 9.0, "speedup_quartiles": [1.32, 1.37]})
    assert str(alone) == "1.32x to 1.37x" and alone.of(1.4) == ""
    assert TOLD_ALONE in how_measured([earlier, earlier | {"fewer_steps": {"speedup_quartiles": [1.0, 2.0]}}])
    assert TOLD_ALONE not in how_measured([earlier])


@pytest.mark.parametrize("file", [RESULTS, FULL_SIZE_RESULTS, VIDEO_RESULTS, STYLES_RESULTS], ids=lambda file: file.stem)
def test_in_every_results_file_a_measured_speedup_lies_within_its_own_quartiles(file: Path) -> None:
    found = [speedup_in(line) for line in lines_with_a_speedup(file)]
    assert found
    assert all(one.low <= (one.low if one.median is None else one.median) <= one.high for one in found)


def test_so_does_that_of_every_method_and_setting_over_all_prompts() -> None:
    compared = [one for lines in by_steps(read_records(COMPARE_RESULTS)).values() for one in points(lines)]
    drawn = [by_method for lines in by_steps(read_records(ADA_RESULTS)).values() for by_method in curves(lines).values()]
    found = compared + [one for several in drawn for one in several]
    assert len(compared) > 100 and len(found) > len(compared)
    assert all(one.measured.low <= one.speedup <= one.measured.high for one in found)


def test_no_table_of_the_readme_shows_a_speedup_outside_its_brackets() -> None:
    shown = re.findall(r"([\d.]+)x \(([\d.]+) to ([\d.]+)\)", (ROOT / "README.md").read_text())
    assert len(shown) > 20
    assert [cells for cells in shown if not float(cells[1]) <= float(cells[0]) <= float(cells[2])] == []
