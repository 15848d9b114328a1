"""Measure what the README claims, and write it there: `python -m analysis bench`, `python -m analysis tables`."""

import argparse
import sys
from pathlib import Path

import diffusers
import transformers
from accelerate import Accelerator
from tqdm import tqdm

from analysis.ablation import ABLATION_RESULTS, VARIANTS, render_ablation, train_all
from analysis.ablation import measure as measure_ablation
from analysis.ada import ADA_RESULTS, held_out
from analysis.ada import measure as measure_ada
from analysis.architectures import ARCHITECTURES
from analysis.atlas import ATLAS, CUTOFFS, INTERVALS, REQUESTS, ROUNDS, WINDOWS, build_atlas
from analysis.bench import BENCHES, MAX_REPEATS, OVERHEAD_ROUNDS, REPEATS, run_bench
from analysis.bench_app import STARTS
from analysis.browser import write_png
from analysis.compare import COMPARE_RESULTS, compare, read_prompts
from analysis.experiment import MAX_STEPS, Request, with_sampler
from analysis.full_size import DTYPES, FORWARDS, FULL_SIZE_REPEATS, FULL_SIZE_RESULTS, Job, defaults, run_full_size
from analysis.host import ROUNDS as HOST_ROUNDS
from analysis.metrics import perceptual_distance
from analysis.optional_rivals import REQUIREMENTS, is_installed
from analysis.points import short
from analysis.records import RESULTS, ROOT, BenchError, Record, read_records
from analysis.rivals import METHODS
from analysis.site import export_site
from analysis.styles import PROMPTS as STYLES_PROMPTS
from analysis.styles import ROUNDS as STYLES_ROUNDS
from analysis.styles import STYLES_RESULTS, measure_styles, render_styles, update_styles
from analysis.tables import BEGIN, END, render, update_readme
from analysis.tables_ada import ada_figure, render_ada, update_ada
from analysis.tables_compare import CURVES, compare_figure, render_compare, update_compare, write_curves
from analysis.tables_full_size import render_full_size, update_full_size
from analysis.trials import TESTED_ON, cutoffs_that_deepen, render_trials, run_trials
from analysis.video import PROMPTS as VIDEO_PROMPTS
from analysis.video import ROUNDS as VIDEO_ROUNDS
from analysis.video import VIDEO_RESULTS, measure_video, render_video, update_video
from blockdance import (
    MIN_STEPS,
    BlockDanceError,
    load_demo_pipeline,
    load_demo_profile,
    load_demo_styles_pipeline,
    load_demo_video_pipeline,
    own_profile,
)
from blockdance.ada import load_demo_policy
from blockdance.demo import PROFILE_FILE
from blockdance.paths import ready_for
from blockdance.storage import RULES

PROFILE_PROMPTS = [
    "rainbow", "wrapped gift", "koala", "fire engine", "hedgehog", "lollipop", "crab", "bus", "sunrise", "lion", "ambulance",
    "rabbit face", "cookie", "shrimp", "train", "whale",
]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Measure what the README claims, and write it there."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_bench(commands.add_parser("bench", help="measure speedup, overheads, cache and app, and write a results file"))
    add_compare(commands.add_parser("compare", help="compare BlockDance with what a user would pick instead"))
    add_ada(commands.add_parser("ada", help="measure what a schedule for each picture gains"))
    add_ablation(commands.add_parser("ada-ablation", help="train and measure each extension of Ada beside the paper's form"))
    add_trials(commands.add_parser("trials", help="try the storage rules of the log that were not kept"))
    add_video(commands.add_parser("video", help="measure reuse in the video model in the box"))
    add_styles(commands.add_parser("styles", help="measure reuse in the three styles of the other picture model in the box"))
    add_atlas(commands.add_parser("atlas", help="compute the comparisons that the page ships with"))
    add_profile(commands.add_parser("profile", help="measure what the planner must know of the model in the box"))
    add_site(commands.add_parser("export-site", help="write the explorer as a static site"))
    add_tables(commands.add_parser("tables", help="write the README's tables from a results file"))
    return parser


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure on the model in the box, with interleaved runs, medians and quartiles, and write one JSON line per result. "
        + " ".join(f"{name}: {bench.measures}." for name, bench in BENCHES.items())
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help=f"interleaved rounds, 1 to {MAX_REPEATS}; overhead takes {OVERHEAD_ROUNDS} times as many, host "
        f"{HOST_ROUNDS} times, the app is started {STARTS} times (default: {REPEATS}, about six minutes on two cores; "
        f"{FULL_SIZE_REPEATS} with --model)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHES),
        default=list(BENCHES),
        help="what to measure; other lines of the results file are kept (default: everything)",
    )
    parser.add_argument(
        "--out", type=Path, help="results file (default: assets/results/bench.jsonl, or full_size.jsonl with --model)"
    )
    parser.set_defaults(run=bench)
    full = parser.add_argument_group(
        "at full size",
        "the true architecture of one of the paper's models in a bare sampling loop, on the GPU if there is one; what the "
        "results file has from the same commit is not measured again, so a bench that was cut off goes on where it was",
    )
    full.add_argument("--model", metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)}")
    full.add_argument(
        "--random-weights", action="store_true", help="required with --model: speed does not depend on the weights"
    )
    full.add_argument("--batch", type=int, nargs="+", help="samples drawn together (default: 1 4 16; on a CPU 1)")
    full.add_argument(
        "--intervals", type=int, nargs="+", default=[2, 3, 4], help="the paper's N; 1 never reuses (default: 2 3 4)"
    )
    full.add_argument(
        "--steps",
        type=int,
        help=f"sampling steps, {MIN_STEPS} to {MAX_STEPS} (default: the preset's; on a CPU half of them, which is said)",
    )
    full.add_argument("--dtype", help=f"one of {', '.join(DTYPES)} (default: bfloat16 on the GPU, float32 on the CPU)")
    full.add_argument(
        "--forward", default="eager", help=f"how the transformer runs, one of {', '.join(FORWARDS)} (default: %(default)s)"
    )


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw prompts with the plain sampler and with every method at every one of its settings, and write one JSON line for "
        "each. What the results file has is not computed again."
    )
    parser.add_argument("--prompts", nargs="+", help="what to draw (default: the 64 of analysis/prompts.txt)")
    parser.add_argument(
        "--methods", nargs="+", help=f"among {', '.join(METHODS)} (default: all whose packages are installed; {REQUIREMENTS})"
    )
    parser.add_argument("--steps", type=int, default=30, help=f"sampling steps, 1 to {MAX_STEPS} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=COMPARE_RESULTS.parent,
        help="folder for results.jsonl, curves.html and curves.png (default: assets/results, where the file is compare.jsonl)",
    )
    parser.set_defaults(run=run_compare)


def add_ada(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw held-out prompts with BlockDance-Ada, with fixed, planned and random schedules, and with fewer steps, and write "
        "one JSON line for each. What the results file has is not drawn again."
    )
    parser.add_argument("--prompts", nargs="+", help="what to draw (default: the 128 of assets/ada/held_out.txt)")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 50], help="sampling steps (default: 30 50)")
    parser.add_argument("--out", type=Path, default=ADA_RESULTS, help="results file (default: assets/results/ada.jsonl)")
    parser.set_defaults(run=run_ada)


def add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Train {len(VARIANTS)} policies that differ from the paper's form in one thing each, for a few minutes, and measure "
        "what they decide. A training that the folder holds is not done again."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder for the trainings")
    parser.add_argument("--out", type=Path, default=ABLATION_RESULTS, help="default: assets/results/ada_ablation.jsonl")
    parser.set_defaults(run=run_ablation)


def add_trials(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw twelve prompts with every storage rule that the log in analysis/README.md tells of, on four schedules of the "
        "model in the box with 30 steps, and print mean and worst LPIPS; about eight minutes on two cores."
    )
    parser.add_argument("--prompts", nargs="+", default=TESTED_ON, help="what to draw (default: twelve)")
    parser.set_defaults(run=trials)


def add_video(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw clips with the plain sampler, with N = 2, 3, 4 in the paper's window for video and with fewer steps, and write "
        "a JSON line for each N; about six minutes on two cores."
    )
    parser.add_argument("--prompts", nargs="+", default=VIDEO_PROMPTS, help="what to draw (default: eight)")
    parser.add_argument("--rounds", type=int, default=VIDEO_ROUNDS, help="interleaved timing rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=VIDEO_RESULTS, help="default: assets/results/video.jsonl")
    parser.set_defaults(run=run_video)


def add_styles(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw the same subjects in every style with the plain sampler, with N = 2, 3, 4 and with fewer steps, and write a JSON "
        "line for each style and N; about five minutes on two cores."
    )
    parser.add_argument(
        "--prompts", nargs="+", help=f"what to draw, without a style (default: the first {STYLES_PROMPTS} of `compare`)"
    )
    parser.add_argument("--rounds", type=int, default=STYLES_ROUNDS, help="interleaved timing rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=STYLES_RESULTS, help="default: assets/results/styles.jsonl")
    parser.set_defaults(run=run_styles)


def add_atlas(parser: argparse.ArgumentParser) -> None:
    settings = len(INTERVALS) * len(CUTOFFS) * len(WINDOWS)
    parser.description = (
        f"Draw {len(REQUESTS)} prompts with the plain sampler, with BlockDance at {settings} settings and with fewer steps, "
        "time them, and write pictures and figures for the page; about ten minutes on two cores."
    )
    parser.add_argument("--out", type=Path, default=ATLAS, help="folder to write (default: assets/atlas)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved timing rounds (default: %(default)s)")
    parser.set_defaults(run=atlas)


def add_profile(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw prompts with the model in the box, plainly and with reuse here and there, and write what the planner must know "
        "of it; about five minutes on two cores."
    )
    parser.add_argument(
        "--prompts", nargs="+", default=PROFILE_PROMPTS, help="what to draw (default: 16 that the comparison does not use)"
    )
    parser.add_argument("--steps", type=int, default=30, help=f"sampling steps, {MIN_STEPS} to {MAX_STEPS} (default: 30)")
    parser.add_argument("--out", type=Path, default=PROFILE_FILE, help="file to write (default: assets/profile.json)")
    parser.set_defaults(run=profile)


def add_site(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write the explorer over the atlas as a static site that any file server can serve, without Python."
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write")
    parser.set_defaults(run=site)


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Replace what stands between {BEGIN} and {END} by tables made from a results file."
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="results file to read (default: assets/results/bench.jsonl)"
    )
    parser.add_argument(
        "--full-size",
        type=Path,
        default=FULL_SIZE_RESULTS,
        help="results file of the benches at full size, if there is one (default: assets/results/full_size.jsonl)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        default=COMPARE_RESULTS,
        help="results file of the comparison, if there is one (default: assets/results/compare.jsonl)",
    )
    parser.add_argument(
        "--ada",
        type=Path,
        default=ADA_RESULTS,
        help="results file of Ada's evidence, if there is one (default: assets/results/ada.jsonl)",
    )
    parser.add_argument(
        "--video",
        type=Path,
        default=VIDEO_RESULTS,
        help="results file of the video model, if there is one (default: assets/results/video.jsonl)",
    )
    parser.add_argument(
        "--styles",
        type=Path,
        default=STYLES_RESULTS,
        help="results file of the model of three styles, if there is one (default: assets/results/styles.jsonl)",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to update (default: README.md)")
    parser.set_defaults(run=tables)


def bench(args: argparse.Namespace) -> None:
    if args.model is not None:
        bench_full_size(args)
        return
    if args.random_weights:
        raise BenchError(f"--random-weights needs --model, one of {', '.join(ARCHITECTURES)}")
    out = args.out or RESULTS
    records: list[Record] = run_bench(args.only, REPEATS if args.repeats is None else args.repeats, out)
    print(render(records, str(out)))
    print(f"\nwritten             {out}")


def atlas(args: argparse.Namespace) -> None:
    manifest = build_atlas(load_demo_pipeline(), perceptual_distance(), args.out, rounds=args.rounds)
    size = sum(file.stat().st_size for file in manifest.parent.iterdir())
    print(f"written             {manifest} and its pictures, {size / 2**20:.1f} MiB")


def profile(args: argparse.Namespace) -> None:
    for prompt in args.prompts:
        Request(prompt, steps=args.steps)
    ready_for(args.out)
    pipe = with_sampler(load_demo_pipeline(), Request.sampler)
    with tqdm(desc="profile", unit="run") as bar:

        def on_run(finished: int, runs: int) -> None:
            bar.total = runs
            bar.update()

        found = own_profile(pipe, args.prompts, steps=args.steps, rules=list(RULES.values()), on_run=on_run)
    found.save(args.out)
    print(f"written             {args.out}, {args.out.stat().st_size / 1024:.0f} KiB")


def site(args: argparse.Namespace) -> None:
    size = export_site(args.folder)
    print(f"written             {args.folder}, {size / 2**20:.1f} MiB; try `python -m http.server --directory {args.folder}`")


def bench_full_size(args: argparse.Namespace) -> None:
    if not args.random_weights:
        raise BenchError("--model needs --random-weights: speed does not depend on the weights, so none are fetched")
    batches, steps = defaults(args.model)
    job = Job(
        args.model,
        tuple(args.batch or batches),
        tuple(args.intervals),
        steps if args.steps is None else args.steps,
        FULL_SIZE_REPEATS if args.repeats is None else args.repeats,
        args.dtype,
        args.forward,
    )
    out = args.out or FULL_SIZE_RESULTS
    print(render_full_size(run_full_size(job, out), str(out)))
    print(f"\nwritten             {out}")


def run_compare(args: argparse.Namespace) -> None:
    requests = [Request(prompt, args.seed, args.steps) for prompt in args.prompts or read_prompts()]
    out = COMPARE_RESULTS if args.out == COMPARE_RESULTS.parent else args.out / "results.jsonl"
    names = args.methods or [name for name, method in METHODS.items() if is_installed(method.package)]
    processes = Accelerator()  # unlike PartialState it heeds ACCELERATE_USE_CPU
    everything = compare(load_demo_pipeline().to(processes.device), requests, names, perceptual_distance(), out)
    processes.end_training()  # a process that ends while its group is open may abort
    if not processes.is_main_process:
        return
    lines = [line for line in everything if line["steps"] == args.steps]
    print(render_compare(lines, str(out)))
    if out != COMPARE_RESULTS:
        compare_figure(lines).write_html(args.out / "curves.html", include_plotlyjs=True)
        write_png(compare_figure(lines), args.out / "curves.png", 900, 640)
    print(f"\nwritten             {out}")


def run_ada(args: argparse.Namespace) -> None:
    pipe, distance = load_demo_pipeline(), perceptual_distance()
    lines = measure_ada(
        pipe, load_demo_policy(), load_demo_profile(), args.prompts or held_out(), args.steps, distance, args.out
    )
    print(render_ada([line for line in lines if line["steps"] in args.steps], str(args.out)))
    print(f"\nwritten             {args.out}")


def run_ablation(args: argparse.Namespace) -> None:
    train_all(args.folder)
    lines = measure_ablation(load_demo_pipeline(), load_demo_profile(), args.folder, perceptual_distance(), args.out)
    print(render_ablation(lines))
    print(f"\nwritten             {args.out}")


def trials(args: argparse.Namespace) -> None:
    profile = load_demo_profile()
    print(render_trials(run_trials(load_demo_pipeline(), profile, perceptual_distance(), args.prompts)))
    expected = [f"{short(value)} with {name}" for name, value in cutoffs_that_deepen(profile).items()]
    print(f"\nplanned for 2x, LPIPS expected: {', '.join(expected)}")


def run_video(args: argparse.Namespace) -> None:
    lines = measure_video(load_demo_video_pipeline(), perceptual_distance(), args.prompts, args.rounds, args.out)
    print(render_video(lines, str(args.out)))
    print(f"\nwritten             {args.out}")


def run_styles(args: argparse.Namespace) -> None:
    prompts = args.prompts or read_prompts()[:STYLES_PROMPTS]
    lines = measure_styles(load_demo_styles_pipeline(), perceptual_distance(), prompts, args.rounds, args.out)
    print(render_styles(lines, str(args.out)))
    print(f"\nwritten             {args.out}")


def tables(args: argparse.Namespace) -> None:
    update_readme(args.readme, read_records(args.results), args.results)
    if args.compare.exists():
        update_compare(args.readme, read_records(args.compare), args.compare)
        if args.compare == COMPARE_RESULTS:
            write_curves(CURVES, read_records(args.compare))
            write_png(compare_figure(read_records(args.compare)), args.compare.with_name("curves.png"), 1300, 640)
    if args.ada.exists():
        update_ada(args.readme, read_records(args.ada), args.ada)
        if args.ada == ADA_RESULTS:
            write_png(ada_figure(read_records(args.ada)), args.ada.with_name("ada.png"), 1300, 900)
    if args.video.exists():
        update_video(args.readme, read_records(args.video), args.video)
    if args.styles.exists():
        update_styles(args.readme, read_records(args.styles), args.styles)
    if args.full_size.exists():
        update_full_size(args.readme, read_records(args.full_size), args.full_size)
    print(f"written             {args.readme}")


def main() -> None:
    args = build_parser().parse_args()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        args.run(args)
    except (BlockDanceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
