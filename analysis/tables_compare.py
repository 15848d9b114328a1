"""Curves instead of points: what each method costs and changes, over all prompts, and the README's table of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from analysis.records import BenchError, Record
from analysis.rivals import METHODS
from analysis.tables import between_markers, named, table

BEGIN = "<!-- compare:begin -->"
END = "<!-- compare:end -->"
LEVELS = (1.25, 1.4, 1.6, 2.0)
"""Measured speedups at which methods are set against each other."""
RESAMPLES = 2000
COMMAND = "python -m analysis compare"


@dataclass(frozen=True)
class Point:
    """One method at one setting, over all prompts."""

    method: str
    knob: str
    prompts: int
    speedup: float
    """The baseline's median seconds over ours."""
    ideal: float
    """The baseline's multiply-accumulates in the blocks over ours, mean over prompts."""
    lpips: float
    """Mean difference from the baseline."""
    interval: tuple[float, float]
    """Of the mean, 95 %, by resampling prompts."""
    worst: float
    ssim: float


def points(lines: Sequence[Record]) -> list[Point]:
    """One for each method and setting, in the order of METHODS and of their speed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["knob"]), []).append(line)
    found = [point(name, knob, group) for (name, knob), group in groups.items()]
    order = list(METHODS)
    return sorted(found, key=lambda one: (order.index(one.method), one.speedup))


def point(name: str, knob: str, lines: Sequence[Record]) -> Point:
    lpips = np.array([line["lpips"] for line in lines])
    return Point(
        name,
        knob,
        len(lines),
        float(np.median([line["baseline_seconds"] for line in lines]) / np.median([line["seconds"] for line in lines])),
        float(np.mean([line["speedup_ideal"] for line in lines])),
        float(lpips.mean()),
        bootstrap(lpips),
        float(lpips.max()),
        float(np.mean([line["ssim"] for line in lines])),
    )


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean, by drawing as many values again and again, with a fixed seed."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def best_at(found: Sequence[Point], name: str, level: float) -> Point | None:
    """The setting of a method that changes least among those that are at least so fast."""
    fast = [one for one in found if one.method == name and one.speedup >= level]
    return min(fast, key=lambda one: one.lpips) if fast else None


def update_compare(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the table.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    several = sorted({line["steps"] for line in lines})
    tables = [render_compare([line for line in lines if line["steps"] == steps], named(results, readme)) for steps in several]
    text = "\n\n".join(tables) if tables else render_compare([], "")
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))


def render_compare(lines: Sequence[Record], results: str) -> str:
    """For each speed the least change each method reaches there; the smallest is bold.

    Raises:
        BenchError: no lines, or lines of different machines or requests.
    """
    if not lines:
        raise BenchError(f"the results file holds no lines; `{COMMAND}` writes them")
    for name in ("machine", "steps", "sampler", "guidance", "lpips_name"):
        if any(line[name] != lines[0][name] for line in lines):
            raise BenchError(f"the lines differ in {name}, so one table cannot hold them; delete the file and compare again")
    found = points(lines)
    best = {(name, level): best_at(found, name, level) for name in METHODS for level in LEVELS}
    least = {level: min((one.lpips for name in METHODS if (one := best[name, level])), default=0.0) for level in LEVELS}
    rows = [
        [f"{name} ({METHODS[name].knob})", *(cell(best[name, level], least[level]) for level in LEVELS)]
        for name in METHODS
        if any(one.method == name for one in found)
    ]
    head = ["method (its setting)", *(f"at least {level:g}x" for level in LEVELS)]
    return f"{caption(lines, results)}\n\n{table(head, rows)}"


def cell(one: Point | None, least: float) -> str:
    if one is None:
        return "not reached"
    low, high = one.interval
    mean = f"**{one.lpips:.5f}**" if one.lpips == least else f"{one.lpips:.5f}"
    return f"{mean} ({low:.5f} to {high:.5f}), worst {one.worst:.5f}; {one.knob} at {one.speedup:.2f}x"


def caption(lines: Sequence[Record], results: str) -> str:
    """What was compared, where, and how to read the cells."""
    first = lines[0]
    machine, prompts = first["machine"], len({line["prompt"] for line in lines})
    place = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    return (
        f"The model in the box, {prompts} prompts, {first['steps']} {first['sampler']} steps, guidance {first['guidance']:g}, "
        f"on {place}. Each cell: of a method's settings that are measured to be at least so fast, the one with the least mean "
        f"{first['lpips_name']} to the baseline (its 95 % interval over prompts), the worst prompt, the setting, and its "
        f"measured speedup. A difference from the baseline is not a quality. `{COMMAND}` wrote [`{results}`]({results})."
    )


def compare_figure(lines: Sequence[Record]) -> go.Figure:
    """Mean difference from the baseline (logarithmic) over measured speedup, one curve a method, with intervals."""
    figure = go.Figure()
    found = points(lines)
    for name in METHODS:
        curve = [one for one in found if one.method == name]
        if curve:
            figure.add_scatter(
                x=[one.speedup for one in curve],
                y=[one.lpips for one in curve],
                error_y={
                    "array": [one.interval[1] - one.lpips for one in curve],
                    "arrayminus": [one.lpips - one.interval[0] for one in curve],
                    "thickness": 1,
                },
                name=name,
                mode="lines+markers",
                line={"width": 4 if name == "blockdance" else 2},
                text=[f"{METHODS[name].knob}: {one.knob}, worst {one.worst:.5f}, SSIM {one.ssim:.4f}" for one in curve],
            )
    figure.update_xaxes(title="measured speedup")
    figure.update_yaxes(title=f"difference from the baseline: {lines[0]['lpips_name']}, mean over prompts", type="log")
    figure.update_layout(template="plotly_white", legend={"orientation": "h"}, margin={"t": 30})
    return figure
