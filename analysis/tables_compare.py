"""Curves instead of points: what each method costs and changes, over all prompts, and the README's table of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from analysis.atlas import ATLAS
from analysis.points import Point, points, short
from analysis.records import BenchError, Record
from analysis.rivals import METHODS
from analysis.tables import between_markers, named, table

BEGIN = "<!-- compare:begin -->"
END = "<!-- compare:end -->"
LEVELS = (1.25, 1.4, 1.6, 2.0)
"""Measured speedups at which methods are set against each other."""
COMMAND = "python -m analysis compare"
CURVES = ATLAS / "comparison.json"
"""The curves as the page shows them."""
GREY = qualitative.D3[7]
VIVID = [colour for colour in (*qualitative.D3, *qualitative.Vivid[1:]) if colour != GREY]
COLOURS = dict(zip(METHODS, [GREY, *VIVID], strict=False))
"""By method, grey for fewer steps; they show on light and on dark ground."""
OTHER_LEVEL = 1.6
OTHER_METRICS = (
    f"The settings of the column of {OTHER_LEVEL:g}x by other metrics. *MACs*: the baseline's multiply-accumulates in the "
    "blocks' linear layers over the method's. *Measured*: the median over prompts of the paired "
    "ratios (in brackets their quartiles). *Peak memory*: what tensors of one run take at most, beside the weights."
)
OURS = "blockdance"
"""What the names of our methods begin with."""


def best_at(found: Sequence[Point], name: str, level: float) -> Point | None:
    """The setting of a method that changes least among those that are at least so fast."""
    fast = [one for one in found if one.method == name and one.speedup >= level]
    return min(fast, key=lambda one: one.lpips) if fast else None


@dataclass(frozen=True)
class Verdict:
    """Who changes least at a speed."""

    level: float
    ours: Point | None
    """The best setting of a method of ours."""
    rival: Point | None
    """The best of all others, fewer steps among them."""
    worst: float
    """The least worst prompt of any rival's best setting."""

    def __str__(self) -> str:
        if self.ours is None or self.rival is None:
            only = self.ours or self.rival
            return f"{self.level:g}x: only {only.method} gets there." if only else f"{self.level:g}x: nothing gets there."
        ours, rival = told(self.ours), told(self.rival)
        if self.ours.lpips >= self.rival.lpips:
            return f"{self.level:g}x: {rival} wins; {ours}."
        lead = "in the mean and at its worst" if self.ours.worst < self.worst else "in the mean, not at its worst"
        return f"{self.level:g}x: {ours} leads {lead}; the best rival is {rival}."


def told(one: Point) -> str:
    return f"{one.method} ({short(one.lpips)}, worst {short(one.worst)})"


def verdicts(found: Sequence[Point]) -> list[Verdict]:
    """One for each of LEVELS."""
    return [verdict(found, level) for level in LEVELS]


def verdict(found: Sequence[Point], level: float) -> Verdict:
    best = [one for name in METHODS if (one := best_at(found, name, level))]
    ours = [one for one in best if one.method.startswith(OURS)]
    rivals = [one for one in best if not one.method.startswith(OURS)]
    return Verdict(
        level,
        min(ours, key=lambda one: one.lpips, default=None),
        min(rivals, key=lambda one: one.lpips, default=None),
        min((one.worst for one in rivals), default=float("inf")),
    )


def by_steps(lines: Sequence[Record]) -> dict[int, list[Record]]:
    """The lines of each number of steps, ascending."""
    return {steps: [line for line in lines if line["steps"] == steps] for steps in sorted({line["steps"] for line in lines})}


def write_curves(file: Path, lines: Sequence[Record]) -> None:
    """The curves and verdicts of every number of steps, for the page."""
    told: dict[str, Any] = {
        "lpips_name": lines[0]["lpips_name"],
        "prompts": len({line["prompt"] for line in lines}),
        "colours": COLOURS,
        "steps": {},
    }
    for steps, some in by_steps(lines).items():
        found = points(some)
        told["steps"][str(steps)] = {
            "curves": {name: [on_page(one) for one in found if one.method == name] for name in METHODS},
            "verdicts": [str(one) for one in verdicts(found)],
        }
    file.write_text(json.dumps(told, separators=(",", ":")) + "\n")


def on_page(one: Point) -> dict[str, Any]:
    """What the page shows of a setting; a PSNR may be infinite, which JSON cannot say."""
    shown = {name: value for name, value in asdict(one).items() if not name.startswith(("psnr", "ssim_", "measured"))}
    return shown | {"speedup": one.speedup}


def update_compare(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the tables.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    tables = [render_compare(some, named(results, readme), folded=True) for some in by_steps(lines).values()]
    text = "\n\n".join(tables) if tables else render_compare([], "")
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))


def render_compare(lines: Sequence[Record], results: str, folded: bool = False) -> str:
    """For each speed who leads, and the least change each method reaches there; the smallest is bold.

    With `folded` the table is one that a reader of a page opens.

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
    said = "\n".join(f"- {one}" for one in verdicts(found))
    cells = table(head, rows)
    cells += f"\n\n{OTHER_METRICS}\n\n{other_metrics(best)}"
    if folded:
        cells = f"<details><summary>Every method, {lines[0]['steps']} steps</summary>\n\n{cells}\n\n</details>"
    return f"{caption(lines, results)}\n\n{said}\n\n{cells}"


def cell(one: Point | None, least: float) -> str:
    if one is None:
        return "not reached"
    low, high = one.interval
    mean = f"**{short(one.lpips)}**" if one.lpips == least else short(one.lpips)
    return f"{mean} ({short(low)} to {short(high)}), worst {short(one.worst)}; {one.knob} at {one.speedup:.2f}x"


def other_metrics(best: Mapping[tuple[str, float], Point | None]) -> str:
    """The same settings by SSIM, PSNR and memory, at one speed."""
    rows = []
    for one in (best[name, OTHER_LEVEL] for name in METHODS):
        if one is not None:
            ssim, psnr = one.ssim_interval, one.psnr_interval
            rows.append(
                [
                    f"{one.method} ({one.knob})",
                    str(one.measured),
                    f"{one.ideal:.2f}x",
                    f"{one.ssim:.5f} ({ssim[0]:.5f} to {ssim[1]:.5f}), worst {one.ssim_worst:.4f}",
                    f"{one.psnr:.1f} dB ({psnr[0]:.1f} to {psnr[1]:.1f}), worst {one.psnr_worst:.1f}",
                    f"{one.peak_bytes / 2**20:.1f} MiB",
                ]
            )
    return table(("method (setting)", "measured", "MACs", "SSIM, mean", "PSNR, mean", "peak memory"), rows)


def caption(lines: Sequence[Record], results: str) -> str:
    """What was compared, where, and how to read the cells."""
    first = lines[0]
    machine, prompts = first["machine"], len({line["prompt"] for line in lines})
    place = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    return (
        f"The model in the box, {prompts} prompts, {first['steps']} {first['sampler']} steps, guidance {first['guidance']:g}, "
        f"on {place}. Each cell: of a method's settings that are measured to be at least so fast, the one with the least mean "
        f"{first['lpips_name']} to the baseline (its 95 % interval over prompts), the worst prompt, the setting, and its "
        "measured speedup, the median over prompts of the baseline's seconds over the method's in the same round. A difference "
        f"from the baseline is not a quality. `{COMMAND}` wrote [`{results}`]({results})."
    )


def compare_figure(lines: Sequence[Record]) -> go.Figure:
    """Mean difference from the baseline (logarithmic) over measured speedup, a curve a method, a panel a number of steps."""
    panels = by_steps(lines)
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=[f"{steps} steps" for steps in panels])
    for column, some in enumerate(panels.values(), start=1):
        found = points(some)
        for name in METHODS:
            curve = [one for one in found if one.method == name and one.lpips > 0]  # 0 has no place on this axis
            if curve:
                figure.add_trace(trace(name, curve, column == 1), 1, column)
    figure.update_xaxes(title="measured speedup")
    figure.update_yaxes(type="log")
    figure.update_yaxes(title=f"difference from the baseline: {lines[0]['lpips_name']}, mean", exponentformat="power", col=1)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.15}, margin={"t": 30})
    return figure


def trace(name: str, curve: Sequence[Point], in_legend: bool) -> go.Scatter:
    """One method's curve, with intervals; ours are drawn through."""
    ours = name.startswith(OURS)
    return go.Scatter(
        x=[one.speedup for one in curve],
        y=[one.lpips for one in curve],
        error_y={
            "array": [one.interval[1] - one.lpips for one in curve],
            "arrayminus": [one.lpips - one.interval[0] for one in curve],
            "thickness": 1,
        },
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": COLOURS[name], "width": 3 if ours else 1.5, "dash": "solid" if ours else "dot"},
        text=[f"{METHODS[name].knob}: {one.knob}, worst {short(one.worst)}, SSIM {one.ssim:.4f}" for one in curve],
    )
