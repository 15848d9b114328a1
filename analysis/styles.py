"""Do simple pictures repeat more than complex ones? The same subjects in the three styles of a model in the box."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from analysis.experiment import Request, warm_up
from analysis.intervals import compared, line_of, rivals_of, row, timed
from analysis.metrics import PerceptualDistance
from analysis.pictures import as_jpeg_bytes
from analysis.records import RESULTS, BenchError, Record, provenance, write_records
from analysis.speedup import how_measured
from analysis.tables import between_markers, named, table
from blockdance import ReuseConfig
from blockdance.scheduled import depth_of

STYLES_RESULTS = RESULTS.with_name("styles.jsonl")
PROMPTS = 32
ROUNDS = 5
BEGIN = "<!-- styles:begin -->"
END = "<!-- styles:end -->"
HEAD = (
    "N", "style", "ideal", "measured", "LPIPS, mean", "worst", "SSIM",
    "control: fewer steps", "measured", "LPIPS, mean", "worst", "SSIM",
)  # fmt: skip


def measure_styles(pipe: Any, distance: PerceptualDistance, prompts: Sequence[str], rounds: int, out: Path) -> list[Record]:
    """Draw every prompt in every style plainly, with N = 2, 3, 4 and with fewer steps; write a line for each style and N.

    Args:
        pipe: a pipeline with `styles` (see `blockdance.demo.WordModel`).
        distance: the perceptual distance.
        prompts: what to draw, without a style; the first one, in the first style, is timed, as the style costs nothing.
        rounds: interleaved, >= 1.
        out: results file.
    """
    first, blocks = Request(pipe.in_style(prompts[0], pipe.styles[0])), depth_of(pipe)
    rivals = rivals_of(ReuseConfig(), first, blocks)
    warm_up(pipe, first.prompt)
    timings = timed(pipe, first, rivals, rounds)
    about = provenance() | {"bench": "styles", "steps": first.steps, "sampler": first.sampler, "guidance": first.guidance}
    about |= {"num_blocks": blocks, "prompts": list(prompts), "lpips_name": distance.name}
    lines = []
    for style in pipe.styles:
        asked = [Request(pipe.in_style(prompt, style)) for prompt in prompts]
        drawn = [compared(pipe, one, rivals, distance) for one in tqdm(asked, desc=style)]
        sizes = {"jpeg_bytes": [len(as_jpeg_bytes(baseline.picture)) for baseline, _ in drawn]}
        for place, rival in enumerate(rivals):
            ours, theirs = (summary([pairs[place][which] for _, pairs in drawn]) for which in (0, 1))
            lines.append(about | {"style": style} | line_of(rival, timings, ours, theirs) | sizes)
    write_records(out, lines)
    return lines


def summary(each: Sequence[Record]) -> Record:
    """Means over pictures, the worst one, and each one's distance."""
    worst = max(each, key=lambda one: one["lpips"])
    return {
        "lpips": float(np.mean([one["lpips"] for one in each])),
        "ssim": float(np.mean([one["ssim"] for one in each])),
        "lpips_worst": worst["lpips"],
        "worst_prompt": worst["prompt"],
        "lpips_of_each": [one["lpips"] for one in each],
    }


def correlation(lines: Sequence[Record]) -> float:
    """Rank correlation of a picture's complexity with how much reuse changes it, in [-1, 1]."""
    pairs = [pair for line in lines for pair in zip(line["jpeg_bytes"], line["lpips_of_each"], strict=True)]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def render_styles(lines: Sequence[Record], results: str) -> str:
    """The table with the sentences that make it readable.

    Raises:
        BenchError: no lines.
    """
    if not lines:
        raise BenchError("the results file holds no lines; `python -m analysis styles` writes them")
    first, styles = lines[0], list(dict.fromkeys(line["style"] for line in lines))
    machine, shortest = first["machine"], min(line["reuse_interval"] for line in lines)
    ours = {style: next(one for one in lines if one["style"] == style) for style in styles}
    sizes = ", ".join(f"{style} {np.mean(line['jpeg_bytes']):.0f}" for style, line in ours.items())
    within = ", ".join(f"{style} {correlation([line]):+.2f}" for style, line in ours.items())
    overall = correlation([line for line in lines if line["reuse_interval"] == shortest])
    caption = (
        f"The model in three styles ({first['num_blocks']} blocks), {len(first['prompts'])} subjects in each style, "
        f"{first['steps']} {first['sampler']} steps, guidance {first['guidance']:g}, cutoff block {first['cutoff_block']}, "
        f"window {first['window_start']:.2f} to {first['window_end']:.2f}, on {machine['cpu']}, {machine['cores']} cores: "
        f"baseline {first['baseline_seconds']:.2f} s (median), {first['rounds']} interleaved runs of one picture, as the style "
        f"costs nothing. {how_measured(lines)} {first['lpips_name']} and SSIM are differences from the baseline. "
        f"`python -m analysis styles` wrote [`{results}`]({results})."
    )
    complexity = (
        f"Complexity is how many bytes the baseline takes as a JPEG of quality 90: in the mean {sizes}. Its rank correlation "
        f"with LPIPS at N = {shortest}: {overall:+.2f} over all pictures, and within a style {within}."
    )
    ordered = sorted(lines, key=lambda line: line["reuse_interval"])
    rows = [row(line, [str(line["reuse_interval"]), line["style"]], cells) for line in ordered]
    return f"{caption}\n\n{table(HEAD, rows)}\n\n{complexity}"


def cells(one: Record) -> list[str]:
    return [f"{one['lpips']:.5f}", f"{one['lpips_worst']:.5f} ({one['worst_prompt']})", f"{one['ssim']:.4f}"]


def update_styles(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the table.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    text = render_styles(lines, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))
