"""The README's table of what BlockDance costs the host."""

from collections.abc import Sequence

from analysis.records import Record

HEAD = (
    "step",
    "in all",
    "beyond the plain pipeline",
    "of that, apart from the blocks",
    "and for each call of a block",
)


def caption(lines: Sequence[Record]) -> str:
    """Where, and what the columns mean."""
    first = lines[0]
    machine, versions = first["machine"], first["versions"]
    return (
        f"What Python costs on {machine['cpu']}, python {versions['python']}, torch {versions['torch']} (commit "
        f"`{first['commit']}`, {first['date']}): {first['num_blocks']} blocks that do nothing, {first['calls_per_step']} calls "
        f"a step, cutoff block {first['cutoff_block']}, in loops of {first['loop_steps']} steps; microseconds, medians of "
        f"{first['repeats']} interleaved loops (in brackets the quartiles). A reuse step skips "
        f"{first['cutoff_block'] + 1} blocks in each call, which are counted as calls all the same. "
        "`python -m analysis bench --only host`."
    )


def rows(lines: Sequence[Record]) -> list[list[str]]:
    """One for each kind of step."""
    return [
        [line["kind"], cell(line, "step"), *(cell(line, f"beyond_{what}") for what in ("step", "outside", "block"))]
        for line in lines
    ]


def cell(line: Record, what: str) -> str:
    """A median and its quartiles; empty where the line has none."""
    name = f"{what}_microseconds"
    if name not in line:
        return ""
    low, high = line[f"{name}_quartiles"]
    return f"{line[name]:.2f} ({low:.2f} to {high:.2f})"
