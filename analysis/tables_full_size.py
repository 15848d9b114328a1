"""The README's table of the paper's models at full size, beside the paper's own figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.full_size import FORWARDS, forward_of
from analysis.records import BenchError, Record
from analysis.speedup import TOLD, speedup_in
from analysis.tables import between_markers, named, seconds, table

BEGIN = "<!-- full-size:begin -->"
END = "<!-- full-size:end -->"
COMMAND = "python -m analysis bench --model NAME --random-weights"
HEAD = (
    "on",
    "model",
    "batch",
    "steps",
    "N",
    "runs",
    "baseline",
    "ideal",
    "measured",
    "of the ideal",
    "outside the blocks",
    "cache",
    "peak memory, baseline / ours",
    "the paper's, N = 2",
)


def update_full_size(readme: Path, records: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the table.

    Raises:
        BenchError: the file has no markers, or the results file no records.
    """
    text = render_full_size(records, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name, BEGIN, END))


def render_full_size(records: Sequence[Record], results: str) -> str:
    """A table for every machine and commit, with a sentence above that names it; each row names the hardware again.

    Raises:
        BenchError: no records.
    """
    if not records:
        raise BenchError(
            "the results file holds no records; `python -m analysis bench --model NAME --random-weights` writes them"
        )
    places: dict[str, list[Record]] = {}
    for record in records:
        places.setdefault(place(record), []).append(record)
    parts = [caption(results)]
    for where, found in places.items():
        parts += [where, table(HEAD, [row(record) for record in sorted(found, key=order)])]
    return "\n\n".join(parts)


def caption(results: str) -> str:
    """What the columns mean."""
    return (
        "The true architectures with random weights (speed does not depend on them), cutoff block 20 of 28, the paper's "
        "window, guidance in one batch of twice the rows, the sampling loop alone. *Runs* are interleaved rounds; *measured* "
        f"is {TOLD}; *ideal* counts blocks. *Outside the blocks* is the "
        "share of a plain run spent in embeddings, output layer and scheduler, which reuse does not save. *Peak memory* is "
        "what tensors take beside the weights. The last column is "
        f"the paper's own figure, on its hardware. `{COMMAND}` wrote [`{results}`]({results})."
    )


def place(record: Record) -> str:
    """Where, in a sentence."""
    machine, versions = record["machine"], record["versions"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads"
    return (
        f"On {machine.get('gpu', cpu)}, {record['dtype']}, torch {versions['torch']}, diffusers {versions['diffusers']} "
        f"(commit `{record['commit']}`, {record['date']}):"
    )


def hardware(record: Record) -> str:
    """On what and how, as a cell."""
    machine = record["machine"]
    chip = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
    return f"{chip}, {FORWARDS[forward_of(record)]}"


def order(record: Record) -> tuple[Any, ...]:
    """Where a row stands in its table."""
    return (
        list(FORWARDS).index(forward_of(record)),
        record["architecture"],
        record["batch"],
        record["steps"],
        record["reuse_interval"],
    )


def row(record: Record) -> list[str]:
    paper, measured = record["paper_speedup"], speedup_in(record)
    reduced = "" if record["steps"] == record["preset_steps"] else f" (reduced from {record['preset_steps']})"
    return [
        hardware(record),
        record["architecture"],
        str(record["batch"]),
        f"{record['steps']}{reduced}",
        str(record["reuse_interval"]),
        str(record["repeats"]),
        seconds(record["baseline_seconds"]),
        f"{record['speedup_ideal']:.2f}x",
        str(measured),
        measured.of(record["speedup_ideal"]),
        f"{100 * record['outside_fraction']:.1f} %",
        f"{record['cache_bytes'] / 2**20:.1f} MiB",
        peaks(record),
        f"{paper:.3f}x" if paper else "",
    ]


def peaks(record: Record) -> str:
    if record["peak_bytes"] is None:
        return "not measured"
    return f"{record['baseline_peak_bytes'] / 2**20:,.0f} / {record['peak_bytes'] / 2**20:,.0f} MiB"
