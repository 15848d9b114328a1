"""The atlas: comparisons computed ahead, so that the page shows something at once and most settings cost nothing.

`python -m analysis atlas` draws every prompt with the plain sampler, with BlockDance at every setting, and with fewer steps,
times them interleaved, and writes a manifest of scenes (`analysis.scene`) and the image files that they point to.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis.estimates import decode_estimates
from analysis.experiment import (
    Request,
    another_seed,
    control_figures,
    figures,
    run_baseline,
    run_observed,
    run_variant,
    step_difference,
    warm_up,
    yardsticks,
)
from analysis.features import component_pictures, shown_blocks
from analysis.machine import describe_machine
from analysis.metrics import PerceptualDistance
from analysis.pictures import Picture
from analysis.records import ROOT, BenchError, circumstances
from analysis.scene import Json, features_part, map_part, new_scene, run_part, tile
from analysis.sprites import LOSSLESS, PREVIEW, sheet
from analysis.timing import time_interleaved
from blockdance import ReuseConfig, Schedule, fixed_schedule
from blockdance.scheduled import depth_of

ATLAS = ROOT / "assets" / "atlas"
MANIFEST = "manifest.json"
REQUESTS = (
    Request("red apple"),
    Request("octopus"),
    Request("slice of pizza"),
    Request("grinning face"),
    Request("rocket"),
    Request("house with garden"),
    Request("castle cake", seed=1, guidance=8.0),
    Request("panda pizza", steps=12),
)
"""What is drawn. The last two were chosen since BlockDance visibly fails on them at the aggressive settings: they combine words
that never stood together in a caption, with strong guidance, or with few steps."""
INTERVALS = (2, 3, 4)
CUTOFFS = (3, 6, 9, 12)
WINDOWS = ((0.40, 0.95), (0.0, 1.0))
"""The paper's for PixArt, and the whole run."""
CONTROL_FRACTIONS = (0.8, 2 / 3, 0.5, 0.37)
"""Fewer steps: 1.25x, 1.5x, 2x and 2.7x."""
ROUNDS = 3


def schedules_of(steps: int, num_blocks: int) -> list[Schedule]:
    """The settings of the atlas."""
    configs = [ReuseConfig(n, cutoff, *window) for window in WINDOWS for n in INTERVALS for cutoff in CUTOFFS]
    return [fixed_schedule(config, steps, num_blocks) for config in configs]


def build_atlas(
    pipe: Any,
    distance: PerceptualDistance,
    out: Path,
    requests: Sequence[Request] = REQUESTS,
    rounds: int = ROUNDS,
) -> Path:
    """Compute the atlas and write it into the folder `out`.

    Args:
        pipe: the model in the box.
        distance: the perceptual distance of all figures.
        out: the folder, made if need be; files of the same names are replaced.
        requests: what is drawn.
        rounds: how often every run is timed, >= 1.

    Returns:
        The manifest's path.

    Raises:
        BenchError: no rounds.
    """
    if rounds < 1:
        raise BenchError(f"rounds must be at least 1, got {rounds}")
    out.mkdir(parents=True, exist_ok=True)
    warm_up(pipe)
    scenes = [build_scene(pipe, distance, request, out, rounds) for request in tqdm(requests, desc="atlas")]
    facts = circumstances(pipe, requests[0])
    shared = {name: facts[name] for name in ("commit", "date", "machine", "versions", "dtype", "model")}
    manifest = (
        {"format": 1, "command": "python -m analysis atlas", "rounds": rounds, "lpips_name": distance.name}
        | shared
        | {"scenes": scenes}
    )
    (out / MANIFEST).write_text(json.dumps(rounded(manifest), separators=(",", ":")) + "\n")
    return out / MANIFEST


def build_scene(pipe: Any, distance: PerceptualDistance, request: Request, out: Path, rounds: int) -> Json:
    """One prompt's scene; its image files are written."""
    slug = "-".join(request.prompt.split())
    num_blocks = depth_of(pipe)
    baseline = run_baseline(pipe, request)
    scene = new_scene(request, num_blocks, baseline.picture, describe_machine())
    schedules = schedules_of(request.steps, num_blocks)
    fewer = [round(fraction * request.steps) for fraction in CONTROL_FRACTIONS]
    timings = time_interleaved(pipe, request, [*schedules, *fewer], rounds)
    pictures, previews = [baseline.picture], [decode_estimates(pipe, baseline.estimates)]
    for schedule in schedules:
        variant = run_variant(pipe, request, schedule, baseline.recording)
        places = tile(f"{slug}.png", 0, len(pictures)), tile(f"{slug}-steps.webp", len(previews))
        pictures.append(variant.picture)
        previews.append(decode_estimates(pipe, variant.estimates))
        told = figures(baseline, variant, distance) | {"step_difference": step_difference(baseline, variant)}
        scene["runs"].append(run_part(told, *places, **timings[schedule]))
    for steps in fewer:
        control = run_baseline(pipe, replace(request, steps=steps))
        picture = tile(f"{slug}.png", 0, len(pictures))
        pictures.append(control.picture)
        scene["controls"].append(run_part(control_figures(baseline, control, distance), picture, **timings[steps]))
    seconds = timings[schedules[0]]["baseline_seconds"]
    scene["baseline"] = {"picture": tile(f"{slug}.png"), "previews": tile(f"{slug}-steps.webp"), "seconds": seconds}
    scene["yardsticks"] = yardsticks(baseline, run_baseline(pipe, another_seed(request)), distance)
    scene |= observed_parts(pipe, request, out, slug)
    write_sheet(out / f"{slug}.png", [pictures], LOSSLESS)
    write_sheet(out / f"{slug}-steps.webp", [row for row in previews if row is not None], PREVIEW)
    return scene


def observed_parts(pipe: Any, request: Request, out: Path, slug: str) -> Json:
    """The similarity map and the features of the baseline."""
    observation = run_observed(pipe, request)
    features = {block: component_pictures(observation.features(block)[:, 0]) for block in shown_blocks(observation.num_blocks)}
    write_sheet(out / f"{slug}-features.png", [list(rows) for rows in features.values() if rows is not None], LOSSLESS)
    return {
        "map": map_part(observation.cosine()[:, :, 0].numpy()),
        "features": features_part(features, f"{slug}-features.png"),
    }


def write_sheet(file: Path, rows: Sequence[Sequence[Picture]], options: dict[str, Any]) -> None:
    """Write the pictures as one image file."""
    sheet(rows).save(file, **options)


def rounded(value: Any) -> Any:
    """The same JSON with numbers of at most seven decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 7) if isinstance(value, float) else value
