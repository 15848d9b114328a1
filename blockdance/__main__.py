"""Draw one prompt with the plain sampler and with BlockDance, and report every figure.

The one place in the library that uses the analysis: a command at the edge, not imported by anything.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from analysis.experiment import (
    MAX_SEED,
    MAX_STEPS,
    SAMPLERS,
    Baseline,
    Request,
    Variant,
    control_figures,
    fewer_steps,
    figures,
    plan,
    run_baseline,
    run_observed,
    run_variant,
    warm_up,
)
from analysis.metrics import perceptual_distance
from analysis.plots import similarity_figure
from blockdance import BlockDanceError, OnStep, ReuseConfig, Schedule, load_demo_pipeline

REPEATS = 3
"""Interleaved runs of each; the pictures are the same, the seconds are those of the run with the median."""
TABLE = """\
schedule            {schedule}
blocks evaluated    {block_evaluations} of {baseline_block_evaluations}
seconds             {seconds:.3f}, baseline {baseline_seconds:.3f} (medians of {repeats} interleaved runs)
speedup             {speedup_measured:.2f}x measured, {speedup_ideal:.2f}x ideal
difference          {lpips:.5f} {lpips_name}, SSIM {ssim:.4f}, PSNR {psnr}
fewer steps         {fewer_steps[lpips]:.5f} {lpips_name} with the plain sampler at {fewer_steps[steps]} steps, \
{fewer_steps[speedup_measured]:.2f}x measured, {fewer_steps[speedup_ideal]:.2f}x ideal
cache               {cache_bytes} bytes
written             {out}: baseline.png, blockdance.png, similarity.html, result.json"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockdance",
        description="Draw a prompt twice from the same noise, with the plain sampler and with BlockDance (CVPR 2025), "
        "using the small model that ships in assets/model. Writes baseline.png, blockdance.png, similarity.html, result.json.",
    )
    parser.add_argument("prompt", help='what to draw, for instance "red apple"')
    parser.add_argument("--steps", type=int, default=30, help=f"sampling steps, 1 to {MAX_STEPS} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of the noise, 0 to {MAX_SEED} (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale, 1 to 20 (default: %(default)s)")
    parser.add_argument("--sampler", default="DDIM", help=f"one of {', '.join(SAMPLERS)} (default: %(default)s)")
    defaults = ReuseConfig()
    parser.add_argument(
        "--reuse-interval",
        type=int,
        default=defaults.reuse_interval,
        help="the paper's N: one cache step, then N - 1 reuse steps; 1 never reuses (default: %(default)s)",
    )
    parser.add_argument(
        "--cutoff-block",
        type=int,
        help="the paper's i: blocks 0..i are skipped on reuse steps, 0 to depth - 2 (default: three quarters of the depth)",
    )
    parser.add_argument(
        "--window-start",
        type=float,
        default=defaults.window_start,
        help="reuse starts at this fraction of the steps (default: %(default)s)",
    )
    parser.add_argument(
        "--window-end",
        type=float,
        default=defaults.window_end,
        help="reuse ends before this fraction of the steps (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: %(default)s)")
    return parser


def bar_for(description: str, bar: tqdm) -> OnStep:
    def on_step(step: int, num_steps: int) -> None:
        bar.set_description(description, refresh=False)
        bar.update()

    return on_step


def run(args: argparse.Namespace) -> None:
    request = Request(args.prompt, args.seed, args.steps, args.guidance, args.sampler)
    config = ReuseConfig(args.reuse_interval, args.cutoff_block, args.window_start, args.window_end)
    pipe = load_demo_pipeline()
    schedule = plan(config, request, len(pipe.transformer.transformer_blocks))
    args.out.mkdir(parents=True, exist_ok=True)
    for word in pipe.unknown_words(request.prompt):
        print(f"note: the model does not know the word {word!r}")
    if config.why_dense(request.steps):
        print(f"note: {config.why_dense(request.steps)}")

    baseline, variant, control, cosine = measure(pipe, request, schedule)
    distance = perceptual_distance()
    result = figures(baseline, variant, distance) | {
        "fewer_steps": control_figures(baseline, control, distance),
        "repeats": REPEATS,
    }
    Image.fromarray(baseline.picture).save(args.out / "baseline.png")
    Image.fromarray(variant.picture).save(args.out / "blockdance.png")
    similarity_figure(cosine, schedule).write_html(args.out / "similarity.html", include_plotlyjs=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = result | {"psnr": "infinite" if result["psnr"] is None else f"{result['psnr']:.1f} dB"}
    print(TABLE.format(**shown, out=args.out))


def measure(pipe: Any, request: Request, schedule: Schedule) -> tuple[Baseline, Variant, Baseline, NDArray[np.floating]]:
    """Baseline, variant and the control with fewer steps, interleaved, and the similarity map (num_blocks, num_steps)."""
    control_request = fewer_steps(request, schedule.ideal_speedup(len(pipe.transformer.transformer_blocks)))
    warm_up(pipe)
    with tqdm(total=REPEATS * (2 * request.steps + control_request.steps) + request.steps, unit="step") as bar:
        rounds = [
            (
                run_baseline(pipe, request, bar_for("baseline", bar)),
                run_variant(pipe, request, schedule, on_step=bar_for("BlockDance", bar)),
                run_baseline(pipe, control_request, bar_for("fewer steps", bar)),
            )
            for _ in range(REPEATS)
        ]
        observation = run_observed(pipe, request, bar_for("similarity map", bar))
    baseline, variant, control = (sorted(runs, key=lambda run: run.seconds)[REPEATS // 2] for runs in zip(*rounds, strict=True))
    return baseline, variant, control, observation.cosine()[:, :, 0].numpy()


def main() -> None:
    args = build_parser().parse_args()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(args)
    except (BlockDanceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
