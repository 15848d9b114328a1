"""The paper's video row on the video model in the box: speedup, and the difference from the baseline frame by frame."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.experiment import Request, control_figures, fewer_steps, figures, run_baseline, run_variant, warm_up
from analysis.metrics import PerceptualDistance
from analysis.records import RESULTS, BenchError, Record, provenance, write_records
from analysis.tables import between_markers, named, table
from analysis.timing import time_interleaved
from blockdance import fixed_schedule
from blockdance.presets import DEMO_VIDEO, config_for
from blockdance.scheduled import depth_of

VIDEO_RESULTS = RESULTS.with_name("video.jsonl")
PROMPTS = (
    "grinning face", "pouting face", "clown face", "sparkling heart", "cat face", "unicorn face", "turtle", "dragon",
)  # fmt: skip
INTERVALS = (2, 3, 4)
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
    configs = [replace(config_for(DEMO_VIDEO), reuse_interval=interval) for interval in INTERVALS]
    schedules = [fixed_schedule(config, first.steps, blocks) for config in configs]
    controls = [fewer_steps(first, schedule.ideal_speedup(blocks)).steps for schedule in schedules]
    warm_up(pipe, first.prompt)
    timed = time_interleaved(pipe, first, [*schedules, *controls], rounds)
    drawn = [list(compared(pipe, Request(prompt), schedules, controls, distance)) for prompt in tqdm(prompts, desc="video")]
    about = provenance() | {"bench": "video", "steps": first.steps, "sampler": first.sampler, "guidance": first.guidance}
    lines = []
    for place, (config, schedule, steps) in enumerate(zip(configs, schedules, controls, strict=True)):
        ours, theirs = (summary([one[place][which] for one in drawn]) for which in (0, 1))
        lines.append(
            about
            | {"reuse_interval": config.reuse_interval, "schedule": str(schedule), "cutoff_block": schedule.cutoff_block}
            | {"num_blocks": blocks, "window_start": config.window_start, "window_end": config.window_end}
            | {"prompts": list(prompts), "frames": drawn[0][0][0]["frames"], "lpips_name": distance.name}
            | {"speedup_ideal": schedule.ideal_speedup(blocks)} | timed[schedule] | ours
            | {"fewer_steps": {"steps": steps, "speedup_ideal": first.steps / steps} | timed[steps] | theirs}
        )  # fmt: skip
    write_records(out, lines)
    return lines


def compared(
    pipe: Any, request: Request, schedules: Sequence[Any], controls: Sequence[int], distance: PerceptualDistance
) -> Iterator[tuple[Record, Record]]:
    """For each schedule its figures against the baseline, and those of its control."""
    baseline = run_baseline(pipe, request)
    for schedule, steps in zip(schedules, controls, strict=True):
        variant = run_variant(pipe, request, schedule, baseline.recording)
        control = run_baseline(pipe, replace(request, steps=steps))
        frames = {"frames": len(baseline.picture)}
        yield figures(baseline, variant, distance) | frames, control_figures(baseline, control, distance) | frames


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
        f"cores: baseline {first['baseline_seconds']:.2f} s, medians of {first['rounds']} interleaved runs of "
        f'"{first["prompts"][0]}". {first["lpips_name"]} and SSIM are differences from the baseline, over '
        f"{len(first['prompts'])} prompts. `python -m analysis video` wrote [`{results}`]({results})."
    )
    return f"{caption}\n\n{table(HEAD, [row(line) for line in lines])}"


def row(line: Record) -> list[str]:
    fewer = line["fewer_steps"]
    return [
        str(line["reuse_interval"]),
        *cells(line),
        f"{fewer['steps']} steps, ideal {fewer['speedup_ideal']:.2f}x",
        *cells(fewer)[1:],
    ]


def cells(one: Record) -> list[str]:
    low, high = one["speedup_quartiles"]
    return [
        f"{one['speedup_ideal']:.2f}x",
        f"{one['speedup_measured']:.2f}x ({low:.2f} to {high:.2f})",
        f"{one['lpips']:.5f}",
        f"{one['lpips_worst_frame']:.5f} ({one['worst_prompt']}, frame {one['worst_frame']})",
        f"{one['ssim']:.4f}",
    ]


def update_video(readme: Path, lines: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the table.

    Raises:
        BenchError: the file has no markers, or there are no lines.
    """
    text = render_video(lines, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))
