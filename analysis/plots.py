"""The similarity map with the schedule drawn on it, as a plotly figure for files; the page draws its own."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from blockdance import Schedule, StepKind

SCALES = ("cosine", "log(1 - cos)")
EDGE = {"color": "#f28c28", "width": 2}
HATCH = "rgba(20, 20, 20, 0.75)"
FLOOR = 1e-6
"""1 - cos below this is rounding of float32."""


def similarity_figure(cosine: NDArray[np.floating], schedule: Schedule, scale: str = "cosine") -> go.Figure:
    """The map of the paper's Fig. 2 with a schedule on it: cutoff line, window, reused cells.

    Args:
        cosine: (num_blocks, num_steps), NaN where nothing was compared.
        schedule: as many steps as the map.
        scale: one of SCALES; the logarithm spreads the values near 1.
    """
    values = cosine if scale == "cosine" else np.log10(np.maximum(1 - cosine, FLOOR))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            customdata=_cell_texts(cosine, schedule),
            hovertemplate="%{customdata}<extra></extra>",
            colorscale="Viridis" if scale == "cosine" else "Viridis_r",
            colorbar={"title": "cosine" if scale == "cosine" else "log₁₀(1 − cos)", "thickness": 12},
        )
    )
    _draw_schedule(figure, schedule, len(cosine))
    figure.update_layout(
        xaxis={"title": "step (0 is the noisiest)", "range": [-0.5, len(schedule) - 0.5], "showgrid": False, "zeroline": False},
        yaxis={"title": "block", "range": [-0.5, len(cosine) - 0.5], "showgrid": False, "zeroline": False, "dtick": 2},
        margin={"l": 50, "r": 10, "t": 30, "b": 45},
        height=380,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(128,128,128,0.15)",
        font={"color": "#7b8794"},
    )
    return figure


def reused_from(schedule: Schedule) -> list[int | None]:
    """For every step the cache step whose output it reuses; None where all blocks run."""
    sources: list[int | None] = []
    last_cache = None
    for step, kind in enumerate(schedule):
        last_cache = step if kind is StepKind.CACHE else last_cache
        sources.append(last_cache if kind is StepKind.REUSE else None)
    return sources


def _cell_texts(cosine: NDArray[np.floating], schedule: Schedule) -> list[list[str]]:
    sources = reused_from(schedule)

    def text(block: int, step: int) -> str:
        value = cosine[block, step]
        likeness = "nothing to compare yet" if np.isnan(value) else f"cosine {value:.5f}"
        reused = sources[step] is not None and block <= schedule.cutoff_at(step)
        fate = f"reused from step {sources[step]}" if reused else "computed"
        return f"block {block}, step {step}<br>{likeness}<br>{fate}"

    return [[text(block, step) for step in range(cosine.shape[1])] for block in range(len(cosine))]


def _draw_schedule(figure: go.Figure, schedule: Schedule, num_blocks: int) -> None:
    reuse = [step for step, kind in enumerate(schedule) if kind is StepKind.REUSE]
    if not reuse:
        return
    cached = [step for step, kind in enumerate(schedule) if kind is StepKind.CACHE]
    cells = [(step, block) for step in reuse for block in range(schedule.cutoff_at(step) + 1)]
    figure.add_scatter(
        x=[step for step, _ in cells],
        y=[block for _, block in cells],
        mode="markers",
        marker={"symbol": "line-ne-open", "size": 9, "color": HATCH, "line": {"width": 1.5, "color": HATCH}},
        hoverinfo="skip",
    )
    figure.add_hline(
        y=schedule.cutoff_block + 0.5,
        line=EDGE,
        annotation_text=f"cutoff {schedule.cutoff_block} of {num_blocks} blocks",
        annotation_position="top left",
        annotation_font_color="white",
        annotation_bgcolor=EDGE["color"],
    )
    for side in (min(cached) - 0.5, max(reuse + cached) + 0.5):
        figure.add_vline(x=side, line=EDGE | {"dash": "dot"})
