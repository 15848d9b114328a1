"""The paper's video row on the video model in the box: speedup, and the difference from the baseline frame by frame."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.experiment import Request, warm_up
from analysis.intervals import compared, line_of, rivals_of, row, timed
from analysis.metrics import PerceptualDistance
from analysis.records import RESULTS, BenchError, Record, provenance, write_records
from analysis.speedup import how_measured
from analysis.tables import between_markers, named, table
from blockdance.presets import DEMO_VIDEO, config_for
from blockdance.scheduled import depth_of

VIDEO_RESULTS = RESULTS.with_name("video.jsonl")
PROMPTS = (
    "grinning face", "pouting face", "clown face", "sparkling heart", "cat face", "unicorn face", "turtle", "dragon",
)  # fmt: skip
ROUNDS = 3
BEGIN = "<!-- video:begin -->"
END = "<!-- video:end -->"
HEAD = (
    "N", "ideal", "measured", "LPIPS, mean of all frames", "worst frame", "SSIM",
    "control: fewer steps", "measured", "LPIPS, mean of all frames", "worst frame", "SSIM",
)  # fmt: skip


def measure_video(pipe: Any, distance: PerceptualDistance, prompts: Sequence[str], rounds: int, out: Path) -> list[Record]:
    """Draw every prompt plainly, with N = 2, 3, 4 and with fewer steps, time one of them, and write a line for each N.

    Args:
        pipe: the video pipeline.
        distance: the perceptual distance, taken frame by frame.
        prompts: what to draw; the first one is timed.
        rounds: interleaved, >= 1.
        out: results file.
    """
    first, blocks = Request(prompts[0]), depth_of(pipe)
    rivals = rivals_of(config_for(DEMO_VIDEO), first, blocks)
    warm_up(pipe, first.prompt)
    timings = timed(pipe, first, rivals, rounds)
    drawn = [compared(pipe, Request(prompt), rivals, distance)[1] for prompt in tqdm(prompts, desc="video")]
    about = provenance() | {"bench": "video", "steps": first.steps, "sampler": first.sampler, "guidance": first.guidance}
    about |= {"num_blocks": blocks, "prompts": list(prompts), "frames": len(drawn[0][0][0]["lpips_of_frames"])}
    lines = []
    for place, rival in enumerate(rivals):
        ours, theirs = (summary([one[place][which] for one in drawn]) for which in (0, 1))
        lines.append(about | {"lpips_name": distance.name} | line_of(rival, timings, ours, theirs))
    write_records(out, lines)
    return lines


def summary(each: Sequence[Record]) -> Record:
    """Means over clips, and the worst frame of all."""
    worst = max(each, key=lambda one: max(one["lpips_of_frames"]))
    return {
        "lpips": float(np.mean([one["lpips"] for one in each])),
        "ssim": float(np.mean([one["ssim"] for one in each])),
        "lpips_worst_frame": max(worst["lpips_of_frames"]),
        "worst_frame": worst["worst_frame"],
        "worst_prompt": worst["prompt"],
    }


def render_video(lines: Sequence[Record], results: str) -> str:
    """The table with the sentence that makes it readable.

    Raises:
        BenchError: no lines.
    """
    if not lines:
        raise BenchError("the results file holds no lines; `python -m analysis video` writes them")
    first = lines[0]
    machine = first["machine"]
    caption = (
        f"The video model in the box ({first['num_blocks']} blocks, {first['frames']} frames), {first['steps']} "
        f"{first['sampler']} steps, guidance {first['guidance']:g}, cutoff block {first['cutoff_block']}, window "
        f"{first['window_start']:.2f} to {first['window_end']:.2f} as in the paper, on {machine['cpu']}, {machine['cores']} "
        f"cores: baseline {first['baseline_seconds']:.2f} s (median), {first['rounds']} interleaved runs of "
        f'"{first["prompts"][0]}". {how_measured(lines)} {first["lpips_name"]} and SSIM are differences from the baseline, '
        f"over {len(first['prompts'])} prompts. `python -m analysis video` wrote [`{results}`]({results})."
    )
    rows = [row(line, [str(line["reuse_interval"])], cells) for line in lines]
    return f"{caption}\n\n{table(HEAD, rows)}"


def cells(one: Record) -> list[str]:
    worst = f"{one['lpips_worst_frame']:.5f} ({one['worst_prompt']}, frame {one['worst_frame']})"
    return [f"{one['lpips']:.5f}", worst, f"{one['ssim']:.4f}"]


def update_video(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the table.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    text = render_video(lines, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))
