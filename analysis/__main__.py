"""Measure what the README claims, and write it there: `python -m analysis bench`, `python -m analysis tables`."""

import argparse
import sys
from pathlib import Path

import diffusers
import transformers

from analysis.bench import BENCHES, MAX_REPEATS, OVERHEAD_ROUNDS, REPEATS, run_bench
from analysis.bench_app import STARTS
from analysis.records import RESULTS, ROOT, Record, read_records
from analysis.tables import BEGIN, END, render, update_readme
from blockdance import BlockDanceError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Measure what the README claims, and write it there."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_bench(commands.add_parser("bench", help="measure speedup, overheads, cache and app, and write a results file"))
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
        default=REPEATS,
        help=f"interleaved rounds, 1 to {MAX_REPEATS}; overhead takes {OVERHEAD_ROUNDS} times as many, the app is started "
        f"{STARTS} times (default: %(default)s, about five minutes on two cores)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHES),
        default=list(BENCHES),
        help="what to measure; other lines of the results file are kept (default: everything)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (default: assets/results/bench.jsonl)")
    parser.set_defaults(run=bench)


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.description = f"Replace what stands between {BEGIN} and {END} by tables made from a results file."
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="results file to read (default: assets/results/bench.jsonl)"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to update (default: README.md)")
    parser.set_defaults(run=tables)


def bench(args: argparse.Namespace) -> None:
    records: list[Record] = run_bench(args.only, args.repeats, args.out)
    print(render(records, str(args.out)))
    print(f"\nwritten             {args.out}")


def tables(args: argparse.Namespace) -> None:
    update_readme(args.readme, read_records(args.results), args.results)
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
