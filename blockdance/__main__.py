"""Draw one prompt with the plain sampler and with BlockDance, and report every figure.

The one place in the library that uses the analysis: a command at the edge, not imported by anything.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import transformers
from numpy.typing import NDArray
from tqdm import tqdm

from analysis.experiment import (
    MAX_SEED,
    MAX_STEPS,
    OWN,
    SAMPLERS,
    Baseline,
    Request,
    Variant,
    check_sampler,
    conditioned_on,
    control_figures,
    default_sampler,
    fewer_steps,
    figures,
    run_baseline,
    run_observed,
    run_variant,
    warm_up,
)
from analysis.metrics import perceptual_distance
from analysis.pictures import is_video, save
from analysis.plots import similarity_figure
from blockdance import (
    BlockDanceError,
    ConfigError,
    OnStep,
    ReuseConfig,
    Schedule,
    fixed_schedule,
    load_demo_profile,
    plan,
)
from blockdance.demo import STYLES, WordModel
from blockdance.presets import DEMO, DEMO_STYLES, DEMO_VIDEO, PRESETS, config_for, load_pipeline
from blockdance.scheduled import depth_of
from blockdance.storage import RULES, rule_named

REPEATS = 3
"""Interleaved runs of each; the pictures are the same, the seconds are those of the run with the median."""
KNOBS = ("reuse_interval", "cutoff_block", "window_start", "window_end")
"""Options of the paper's schedule, which the planner does without."""
TABLE = """\
schedule            {schedule}
blocks evaluated    {block_evaluations} of {baseline_block_evaluations}
seconds             {seconds:.3f}, baseline {baseline_seconds:.3f} (medians of {repeats} interleaved runs)
speedup             {speedup_measured:.2f}x measured, {speedup_ideal:.2f}x ideal
difference          {lpips:.5f} {lpips_name}, SSIM {ssim:.4f}, PSNR {psnr}
fewer steps         {fewer_steps[lpips]:.5f} {lpips_name} with the plain sampler at {fewer_steps[steps]} steps, \
{fewer_steps[speedup_measured]:.2f}x measured, {fewer_steps[speedup_ideal]:.2f}x ideal
cache               {cache_bytes} bytes
written             {out}: {files}"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockdance",
        description="Draw a prompt twice from the same noise, with the plain sampler and with BlockDance (CVPR 2025). "
        "Writes baseline.png, blockdance.png (or .gif for a video), similarity.html, result.json.",
    )
    parser.add_argument("prompt", help='what to draw, for instance "red apple"; for a DiT the name of an ImageNet class')
    parser.add_argument(
        "--model",
        default=DEMO,
        help=f"{DEMO} is the small picture model that ships in assets/model, {DEMO_STYLES} the one with more subjects and "
        f"three styles in assets/styles, {DEMO_VIDEO} the video model in assets/video; "
        f"{', '.join(PRESETS)} are the paper's, from the Hugging "
        "Face hub, with the paper's settings as defaults; or the folder of a diffusers pipeline (default: %(default)s)",
    )
    parser.add_argument("--style", help=f"one of {', '.join(STYLES)} ({DEMO_STYLES} alone; default: what the prompt says)")
    parser.add_argument("--steps", type=int, help=f"sampling steps, 1 to {MAX_STEPS} (default: 30, or the preset's)")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of the noise, 0 to {MAX_SEED} (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 to 20 (default: 4, or the preset's)")
    parser.add_argument(
        "--sampler",
        help=f"one of {', '.join(SAMPLERS)} (default: DDIM, or the preset's, or "
        f"{OWN} for a folder whose model fits only its own scheduler)",
    )
    defaults = ReuseConfig()
    parser.add_argument(
        "--reuse-interval",
        type=int,
        help=f"the paper's N: one cache step, then N - 1 reuse steps; 1 never reuses (default: {defaults.reuse_interval})",
    )
    parser.add_argument(
        "--cutoff-block",
        type=int,
        help="the paper's i: blocks 0..i are skipped on reuse steps, 0 to depth - 2 (default: three quarters of the depth, "
        "20 of the paper's 28)",
    )
    parser.add_argument(
        "--window-start",
        type=float,
        help=f"reuse starts at this fraction of the steps (default: {defaults.window_start}, or the preset's)",
    )
    parser.add_argument(
        "--window-end",
        type=float,
        help=f"reuse ends before this fraction of the steps (default: {defaults.window_end}, or the preset's)",
    )
    parser.add_argument(
        "--target-speedup",
        type=float,
        help=f"let the planner choose a schedule with this ideal speedup, above 1, and leave out the four above ({DEMO} alone)",
    )
    parser.add_argument(
        "--storage",
        default="latest",
        help=f"what a reuse step starts from, one of {', '.join(RULES)}: the last cache step's output, as in the paper, or the "
        "last two continued by a straight line (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: %(default)s)")
    return parser


def bar_for(description: str, bar: tqdm) -> OnStep:
    def on_step(step: int, num_steps: int) -> None:
        bar.set_description(description, refresh=False)
        bar.update()

    return on_step


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def settings(args: argparse.Namespace) -> tuple[Request, ReuseConfig]:
    """What the options say, and the preset where they say nothing."""
    preset = PRESETS.get(args.model)
    request, config = Request(args.prompt, args.seed), config_for(args.model)
    if preset is not None:
        request = replace(request, steps=preset.steps, guidance=preset.guidance, sampler=preset.sampler)
    return (
        replace(request, **given(steps=args.steps, guidance=args.guidance, sampler=args.sampler)),
        replace(
            config,
            **given(**{name: getattr(args, name) for name in KNOBS}),
        ),
    )


def in_style(pipe: Any, prompt: str, style: str) -> str:
    """The prompt with the style's word.

    Raises:
        ConfigError: the model has no such style.
    """
    if not isinstance(pipe, WordModel):
        raise ConfigError(f"--style needs --model {DEMO_STYLES}, as it alone has styles, got {style!r}")
    return pipe.in_style(prompt, style)


def check_planned(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go with the planner's."""
    if args.model != DEMO:
        raise ConfigError(f"--target-speedup needs --model {DEMO}, as it alone ships with a profile, got {args.model!r}")
    beside = [f"--{name.replace('_', '-')}" for name in KNOBS if getattr(args, name) is not None]
    if beside:
        raise ConfigError(f"--target-speedup has the planner choose the whole schedule; leave out {', '.join(beside)}")


def run(args: argparse.Namespace) -> None:
    request, config = settings(args)
    rule_named(args.storage)
    if args.target_speedup is not None:
        check_planned(args)
    pipe = load_pipeline(args.model)
    if args.style is not None:
        request = replace(request, prompt=in_style(pipe, request.prompt, args.style))
    if args.sampler is None and default_sampler(pipe) == OWN:
        request = replace(request, sampler=OWN)
    check_sampler(pipe, request.sampler)
    conditioned_on(pipe, request.prompt)
    schedule = chosen_schedule(args, request, config, depth_of(pipe))
    args.out.mkdir(parents=True, exist_ok=True)
    for word in pipe.unknown_words(request.prompt) if isinstance(pipe, WordModel) else []:
        near = ", ".join(pipe.nearest_words(word))
        print(f"note: the model does not know the word {word!r}" + (f"; near it are {near}" if near else ""))
    if args.target_speedup is None and config.why_dense(request.steps):
        print(f"note: {config.why_dense(request.steps)}")

    baseline, variant, control, cosine = measure(pipe, request, schedule, args.storage)
    distance = perceptual_distance()
    result = figures(baseline, variant, distance) | {
        "fewer_steps": control_figures(baseline, control, distance),
        "repeats": REPEATS,
    }
    files = [*save(baseline.picture, args.out / "baseline"), *save(variant.picture, args.out / "blockdance")]
    similarity_figure(cosine, schedule).write_html(args.out / "similarity.html", include_plotlyjs=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = result | {"psnr": "infinite" if result["psnr"] is None else f"{result['psnr']:.1f} dB"}
    print(TABLE.format(**shown, out=args.out, files=", ".join([*files, "similarity.html", "result.json"])))
    if is_video(baseline.picture):
        worst = result["worst_frame"]
        print(
            f"worst frame         {worst}: {result['lpips_of_frames'][worst]:.5f}, SSIM {result['ssim_of_frames'][worst]:.4f}"
        )


def chosen_schedule(args: argparse.Namespace, request: Request, config: ReuseConfig, num_blocks: int) -> Schedule:
    """What the sliders' options say, or what the planner finds.

    Raises:
        BlockDanceError: the cutoff does not fit, or the planner cannot reach its goal.
    """
    if args.target_speedup is None:
        return fixed_schedule(config, request.steps, num_blocks)
    rule, profile = rule_named(args.storage), load_demo_profile()
    found = plan(target_speedup=args.target_speedup, steps=request.steps, storage=rule, profile=profile)
    low, high = found.interval
    print(f"planned             {found.schedule}, {found.distance} of nine pictures in ten {low:.2g} to {high:.2g}")
    return found.schedule


def measure(
    pipe: Any, request: Request, schedule: Schedule, storage: str
) -> tuple[Baseline, Variant, Baseline, NDArray[np.floating]]:
    """Baseline, variant and the control with fewer steps, interleaved, and the similarity map (num_blocks, num_steps)."""
    control_request = fewer_steps(request, schedule.ideal_speedup(depth_of(pipe)))
    warm_up(pipe, request.prompt)
    with tqdm(total=REPEATS * (2 * request.steps + control_request.steps) + request.steps, unit="step") as bar:
        rounds = [
            (
                run_baseline(pipe, request, bar_for("baseline", bar)),
                run_variant(pipe, request, schedule, on_step=bar_for("BlockDance", bar), storage=storage),
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
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(args)
    except (BlockDanceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
