"""What Ada gains: its curve beside those of schedules that look at no picture, and how its decisions differ."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from scipy.stats import spearmanr

from analysis.ablation import UPDATES, read_ablation, render_ablation
from analysis.points import RESAMPLES, Point, point, short
from analysis.records import BenchError, Record
from analysis.tables import between_markers, named, table
from analysis.tables_compare import by_steps

BEGIN = "<!-- ada:begin -->"
END = "<!-- ada:end -->"
COMMAND = "python -m analysis ada"
METHODS = {
    "ada": "Ada",
    "planned-late": "the planner, reusing only where Ada may",
    "planned": "the planner, on any step",
    "fixed": "fixed interval",
    "random": "Ada's number of reuse steps, at random places",
    "fewer-steps": "plain sampler, fewer steps",
}
COLOURS = dict(zip(METHODS, [qualitative.D3[k] for k in (1, 0, 9, 2, 4, 7)], strict=True))
REFERENCE = ("fixed", "N=2")
"""The paper says what Ada gains at this one's quality."""
BINS = 16
"""Rows of the heatmap, each of as many pictures."""
SHOWN_SAVING = "0.55"
ABLATION = (
    "Each extension beside the paper's form: trained for {updates} updates with {steps} steps, each measured on "
    "{pictures} held-out prompts. Savings differ, so the planner's schedule with as many reuse steps stands beside each. "
    "`python -m analysis ada-ablation DIR` trained and measured them."
)


def curves(lines: Sequence[Record]) -> dict[str, list[Point]]:
    """By method, its settings from slow to fast."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["knob"]), []).append(line | {"peak_bytes": 0})
    found = [point(name, knob, group) for (name, knob), group in groups.items()]
    return {name: sorted((one for one in found if one.method == name), key=lambda one: one.speedup) for name in METHODS}


def losses(lines: Sequence[Record], method: str, knob: str, prompts: Sequence[str]) -> NDArray[np.float64]:
    """LPIPS of every prompt."""
    known = {line["prompt"]: line["lpips"] for line in lines if (line["method"], line["knob"]) == (method, knob)}
    return np.array([known[prompt] for prompt in prompts])


def speed_at(level: NDArray[np.float64], speeds: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a curve of mean LPIPS over speed reaches a level, by straight lines in its logarithm; NaN beyond its ends.

    Args:
        level: (n,).
        speeds: of the settings, ascending, (k,).
        means: of every resampling, (n, k).
    """
    found = np.full(len(level), np.nan)
    for row, (wanted, curve) in enumerate(zip(np.log(level), np.log(means), strict=True)):
        rising = np.maximum.accumulate(curve)
        if rising[0] <= wanted <= rising[-1]:
            found[row] = np.interp(wanted, rising, speeds)
    return found


def gain(lines: Sequence[Record], method: str) -> tuple[float, float, float] | None:
    """Speed over that of the fixed N = 2 at its mean LPIPS, and its 95 % interval over prompts; None beyond the curve."""
    points = curves(lines)
    prompts = sorted({line["prompt"] for line in lines})
    chosen = np.random.default_rng(0).integers(len(prompts), size=(RESAMPLES, len(prompts)))
    chosen = np.vstack([np.arange(len(prompts)), chosen])
    level = losses(lines, *REFERENCE, prompts)[chosen].mean(axis=1)
    means = np.stack([losses(lines, method, one.knob, prompts)[chosen].mean(axis=1) for one in points[method]], axis=1)
    speeds = np.array([one.speedup for one in points[method]])
    reference = next(one.speedup for one in points["fixed"] if one.knob == REFERENCE[1])
    found = speed_at(level, speeds, means) / reference
    if np.isnan(found[0]):
        return None
    low, high = np.nanquantile(found[1:], [0.025, 0.975])
    return float(found[0]), float(low), float(high)


def kinds_of(line: Record) -> str:
    """Without the blocks that reuse steps may name."""
    return "".join(letter for letter in line["schedule"] if not letter.isdigit())


def decisions(lines: Sequence[Record], saving: str = SHOWN_SAVING) -> list[Record]:
    """Ada's lines at one saving, from the simplest picture to the most complex."""
    chosen = [line for line in lines if (line["method"], line["knob"]) == ("ada", saving)]
    return sorted(chosen, key=lambda line: line["jpeg_bytes"])


def correlations(lines: Sequence[Record]) -> str:
    """How the share of reuse goes with what the picture is like."""
    ours = decisions(lines)
    hard = {line["prompt"]: line["lpips"] for line in lines if (line["method"], line["knob"]) == REFERENCE}
    shares = [line["reused"] for line in ours]
    if len(set(shares)) == 1:
        return f"all pictures get the same number of reuse steps, {shares[0]}"
    simple = spearmanr(shares, [line["jpeg_bytes"] for line in ours]).statistic
    difficult = spearmanr(shares, [hard[line["prompt"]] for line in ours]).statistic
    return (
        f"{min(shares)} to {max(shares)} of {ours[0]['decided']} steps reuse, in {len({line['schedule'] for line in ours})} "
        f"different schedules; rank correlation of their number with complexity {simple:+.2f}, with how much N = 2 changes the "
        f"picture {difficult:+.2f}"
    )


def render_ada(lines: Sequence[Record], results: str) -> str:
    """One table a number of steps, with what Ada gains over the fixed N = 2 and over the planner.

    Raises:
        BenchError: no lines.
    """
    if not lines:
        raise BenchError(f"the results file holds no lines; `{COMMAND}` writes them")
    first = lines[0]
    prompts, machine = len({line["prompt"] for line in lines}), first["machine"]
    parts = [
        f"The model in the box, {prompts} prompts that no training has seen, {first['sampler']}, guidance "
        f"{first['guidance']:g}, on {machine['cpu']}, {machine['torch_threads']} thread. Speed is the median over "
        f"prompts of the baseline's seconds over the method's, of the whole call (of replayed steps the baseline's), the "
        f"decision included, in brackets the quartiles of these ratios. {first['lpips_name']} to the "
        f"baseline, mean over prompts (95 % interval) and worst; a difference, not a quality. `{COMMAND}` wrote "
        f"[`{results}`]({results})."
    ]
    for steps, some in by_steps(lines).items():
        summary = f"<details><summary>Every setting, {steps} steps</summary>"
        parts += [f"**{steps} steps.** {said(some)}", f"{summary}\n\n{rows_of(some)}\n\n</details>"]
    ablation = read_ablation()
    if ablation:
        pictures = len({line["prompt"] for line in ablation})
        parts += [ABLATION.format(pictures=pictures, steps=ablation[0]["steps"], updates=UPDATES)]
        parts += [render_ablation(ablation)]
    return "\n\n".join(parts)


def said(lines: Sequence[Record]) -> str:
    """The gains in a sentence, and the decisions in another."""
    told = []
    for name in METHODS:
        if name not in ("fixed", "fewer-steps", "random") and curves(lines)[name] and (found := gain(lines, name)):
            told.append(f"{METHODS[name]} {found[0]:.3f} times ({found[1]:.3f} to {found[2]:.3f})")
    return (
        f"Speed over that of N = 2 at its LPIPS: {'; '.join(told) or 'no curve reaches it'}. "
        f"At a wanted share of {SHOWN_SAVING}: {correlations(lines)}."
    )


def rows_of(lines: Sequence[Record]) -> str:
    rows = [
        [METHODS[name], one.knob, str(one.measured), f"{one.ideal:.2f}x", *cells(one)]
        for name, several in curves(lines).items()
        for one in several
    ]
    return table(["schedule", "setting", "measured", "ideal", "LPIPS, mean", "worst", "SSIM"], rows)


def cells(one: Point) -> tuple[str, str, str]:
    low, high = one.interval
    return f"{short(one.lpips)} ({short(low)} to {short(high)})", short(one.worst), f"{one.ssim:.4f}"


def update_ada(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the tables.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    text = render_ada(lines, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))


def ada_figure(lines: Sequence[Record]) -> go.Figure:
    """Mean LPIPS (line) and worst (dots) over measured speed, and below how often each step reuses, simple pictures first."""
    panels = by_steps(lines)
    titles = [f"{steps} steps: mean LPIPS, and the worst (small)" for steps in panels]
    titles += [f"{steps} steps: how often a step reuses, Ada at {SHOWN_SAVING}" for steps in panels]
    figure = make_subplots(2, len(panels), subplot_titles=titles, vertical_spacing=0.14, row_heights=[0.55, 0.45])
    for column, some in enumerate(panels.values(), start=1):
        for name, several in curves(some).items():
            at, colour = [one.speedup for one in several], COLOURS[name]
            bars = {
                "array": [one.interval[1] - one.lpips for one in several],
                "arrayminus": [one.lpips - one.interval[0] for one in several],
                "thickness": 1,
            }
            figure.add_trace(
                go.Scatter(
                    x=at, y=[one.lpips for one in several], error_y=bars, name=METHODS[name], legendgroup=name,
                    showlegend=column == 1, line={"color": colour, "width": 3 if name == "ada" else 1.5},
                ), 1, column,
            )  # fmt: skip
            dots = {"color": colour, "size": 4, "symbol": "diamond"}
            figure.add_trace(
                go.Scatter(
                    x=at, y=[one.worst for one in several], mode="markers", marker=dots, legendgroup=name, showlegend=False
                ), 1, column,
            )  # fmt: skip
        figure.add_trace(reuse_map(some, column == 1), 2, column)
    figure.update_yaxes(type="log", exponentformat="power", row=1)
    figure.update_xaxes(title="measured speedup, decision included", row=1)
    figure.update_xaxes(title="step", row=2)
    figure.update_yaxes(title="simple pictures below, complex above", showticklabels=False, row=2, col=1)
    figure.update_layout(template="plotly_white", legend={"orientation": "h", "y": -0.1}, margin={"t": 40})
    return figure


def reuse_map(lines: Sequence[Record], with_scale: bool) -> go.Heatmap:
    """The share of pictures that reuse on each step, in bins of like complexity."""
    letters = np.array([[letter == "r" for letter in kinds_of(line)] for line in decisions(lines)], dtype=float)
    bins = np.array_split(letters, min(BINS, len(letters)))
    return go.Heatmap(z=[one.mean(axis=0) for one in bins], zmin=0, zmax=1, colorscale="Oranges", showscale=with_scale)
