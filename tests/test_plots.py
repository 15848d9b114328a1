"""The figures say what the schedule and the trace say."""

import json
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from numpy.typing import NDArray

from analysis.plots import FLOOR, reused_from, similarity_figure
from blockdance import Schedule

BLOCKS, TEXT, CUTOFF = 5, "ffcrrfcrff", 2
SCHEDULE = Schedule.parse(TEXT, CUTOFF)
SOURCES: list[int | None] = [None, None, None, 2, 2, None, None, 6, None, None]


def cosine_map() -> NDArray[np.float32]:
    values = np.random.default_rng(0).uniform(0.9, 1, (BLOCKS, len(TEXT))).astype(np.float32)
    values[:, 0] = np.nan
    values[1, 4] = np.nan
    values[2, 5] = 1
    return values


def lines(figure: go.Figure, axis: str) -> list[float]:
    """Where straight lines across the whole figure stand on an axis."""
    ends = [(shape[f"{axis}0"], shape[f"{axis}1"]) for shape in figure.layout.shapes if "domain" not in shape[f"{axis}ref"]]
    assert all(start == end for start, end in ends)
    return sorted(start for start, _ in ends)


def test_the_cosine_scale_shows_the_map_itself() -> None:
    np.testing.assert_array_equal(similarity_figure(cosine_map(), SCHEDULE).data[0].z, cosine_map())


def test_the_logarithmic_scale_spreads_the_values_near_one_and_stays_finite() -> None:
    cosine = cosine_map().astype(np.float64)
    shown = similarity_figure(cosine, SCHEDULE, "log(1 - cos)").data[0].z
    assert 10 ** shown[3, 3] == pytest.approx(1 - cosine[3, 3])
    assert 10 ** shown[2, 5] == pytest.approx(FLOOR)
    np.testing.assert_array_equal(np.isnan(shown), np.isnan(cosine))


def test_likeness_has_the_same_end_of_the_colours_on_both_scales() -> None:
    cosine, logarithm = (similarity_figure(cosine_map(), SCHEDULE, scale).data[0] for scale in ("cosine", "log(1 - cos)"))
    ends = [[colour for _, colour in heatmap.colorscale] for heatmap in (cosine, logarithm)]
    assert ends[0] == ends[1][::-1]


@pytest.mark.parametrize("scale", ["cosine", "log(1 - cos)"])
@pytest.mark.parametrize(
    ("text", "sources"), [(TEXT, SOURCES), ("crrfffffcr", [None, 0, 0, None, None, None, None, None, None, 8])]
)
def test_a_hover_text_tells_the_cells_place_likeness_and_fate(text: str, sources: list[int | None], scale: str) -> None:
    cosine = cosine_map()
    texts = similarity_figure(cosine, Schedule.parse(text, CUTOFF), scale).data[0].customdata
    told = [[texts[block][step].split("<br>") for step in range(len(TEXT))] for block in range(BLOCKS)]
    for block, row in enumerate(told):
        for step, (place, likeness, fate) in enumerate(row):
            source = sources[step] if block <= CUTOFF else None
            value = cosine[block, step]
            assert place == f"block {block}, step {step}"
            assert likeness == ("nothing to compare yet" if math.isnan(value) else f"cosine {value:.5f}")
            assert fate == ("computed" if source is None else f"reused from step {source}")


def test_exactly_the_reused_cells_are_marked() -> None:
    marks = similarity_figure(cosine_map(), SCHEDULE).data[1]
    marked = list(zip(marks.x, marks.y, strict=True))
    expected = {(step, block) for step in (3, 4, 7) for block in range(CUTOFF + 1)}
    assert set(marked) == expected and len(marked) == len(expected)


def test_the_cutoff_line_lies_between_the_last_skipped_and_the_first_run_block() -> None:
    figure = similarity_figure(cosine_map(), SCHEDULE)
    assert lines(figure, "y") == [CUTOFF + 0.5]
    assert [note.text for note in figure.layout.annotations] == ["cutoff 2 of 5 blocks"]


@pytest.mark.parametrize(
    ("text", "edges"), [(TEXT, [1.5, 7.5]), ("crcrcrcrcr", [-0.5, 9.5]), ("fffcrcrcff", [2.5, 7.5]), ("ffcffffrff", [1.5, 7.5])]
)
def test_the_window_is_edged_before_its_first_and_after_its_last_step(text: str, edges: list[float]) -> None:
    assert lines(similarity_figure(cosine_map(), Schedule.parse(text, CUTOFF)), "x") == edges


@pytest.mark.parametrize("text", ["ffffffffff", "ffcffccfff"])
def test_nothing_is_drawn_over_the_map_when_nothing_is_reused(text: str) -> None:
    figure = similarity_figure(cosine_map(), Schedule.parse(text, CUTOFF))
    assert len(figure.data) == 1
    assert not figure.layout.shapes and not figure.layout.annotations
    assert all(label.endswith("computed") for row in figure.data[0].customdata for label in row)


def test_the_map_shows_every_block_and_step_to_the_edges_of_their_cells() -> None:
    layout = similarity_figure(cosine_map(), SCHEDULE).layout
    assert tuple(layout.xaxis.range) == (-0.5, len(TEXT) - 0.5)
    assert tuple(layout.yaxis.range) == (-0.5, BLOCKS - 0.5)


def test_each_reuse_step_is_hatched_up_to_its_own_cutoff() -> None:
    figure = similarity_figure(cosine_map(), Schedule.parse("ffcr1r3fffff", 0))
    hatched = list(zip(figure.data[1].x, figure.data[1].y, strict=True))
    assert hatched == [(3, 0), (3, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    fates = figure.data[0].customdata
    assert [fates[2][step].split("<br>")[-1] for step in (3, 4)] == ["computed", "reused from step 2"]


def test_a_map_of_a_single_step_is_a_figure_too() -> None:
    figure = similarity_figure(np.full((BLOCKS, 1), np.nan), Schedule.dense(1))
    assert [row[0].split("<br>")[1:] for row in figure.data[0].customdata] == [["nothing to compare yet", "computed"]] * BLOCKS


@pytest.mark.parametrize("scale", ["cosine", "log(1 - cos)"])
def test_a_figure_is_valid_json_with_null_where_nothing_was_compared(scale: str) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads(similarity_figure(cosine_map().astype(np.float64), SCHEDULE, scale).to_json(), parse_constant=refuse)
    assert len(loaded["data"]) == 2


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        (TEXT, SOURCES),
        ("crrcr", [None, 0, 0, None, 3]),
        ("cfrcc", [None, None, 0, None, None]),
        ("ffff", [None] * 4),
    ],
)
def test_a_step_reuses_the_last_cache_step_before_it(text: str, sources: list[int | None]) -> None:
    assert reused_from(Schedule.parse(text, 1)) == sources
