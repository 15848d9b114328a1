"""The curves of a training, from its log."""

import json
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from blockdance.paths import AnyPath, written

PANELS = {
    "reward": "reward",
    "saving": "saving C, and what was wanted (grey)",
    "quality": "quality Q",
    "entropy": "entropy, nats a step",
}
WINDOW = 20
"""Updates that a line is the mean of."""


def write_curves(log: AnyPath, out: AnyPath) -> None:
    """Reward, saving, quality and entropy over the updates, as a page of its own."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    figure = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, subplot_titles=list(PANELS.values()))
    for row, name in enumerate(PANELS, start=1):
        for key, colour in ((name, "#1f77b4"), *((("wanted", "#999999"),) if name == "saving" else ())):
            values = [line[key] for line in lines]
            means = [sum(part) / len(part) for k in range(len(values)) if (part := values[max(0, k + 1 - WINDOW) : k + 1])]
            at = [line["update"] for line in lines]
            figure.add_trace(go.Scatter(x=at, y=means, name=key, line_color=colour), row=row, col=1)
    figure.update_layout(height=900, showlegend=False, title=f"Training: means of {WINDOW} updates")
    figure.update_xaxes(title="update", row=len(PANELS), col=1)
    written(out, lambda new: figure.write_html(new, include_plotlyjs=True))
