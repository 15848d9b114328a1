"""The README's tables, made from the results file; nothing in them is typed by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import tables_host
from analysis.records import BenchError, Record
from analysis.speedup import TOLD, speedup_in

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
SPEEDUP_HEAD = (
    "N",
    "cutoff block",
    "ideal",
    "measured",
    "of the ideal",
    "difference from the baseline: LPIPS / SSIM",
    "control: fewer steps",
    "measured",
    "difference from the baseline: LPIPS / SSIM",
)


def update_readme(readme: Path, records: Sequence[Record], results: Path) -> None:
    """Replace what stands between the markers of a file by the tables.

    Raises:
        BenchError: the file has no markers, or the records do not belong together.
    """
    text = render(records, named(results, readme))
    readme.write_text(between_markers(readme.read_text(), text, readme.name))


def between_markers(page: str, text: str, name: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with `text` between its markers.

    Raises:
        BenchError: not exactly one pair of markers, in order.
    """
    if not (page.count(begin) == page.count(end) == 1 and page.index(begin) < page.index(end)):
        raise BenchError(f"{name} needs one line {begin} and after it one line {end} to hold the tables")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def named(results: Path, readme: Path) -> str:
    """The results file as a reader of the page finds it."""
    folder, file = readme.resolve().parent, results.resolve()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def render(records: Sequence[Record], results: str) -> str:
    """The tables with the sentences that make them readable.

    Raises:
        BenchError: no records, or records of different machines, models or requests.
    """
    host = [record for record in records if record["bench"] == "host"]
    boxed = [record for record in records if record["bench"] != "host"]
    parts = [part for group in by_machine(boxed) for part in render_boxed(group, results)] if boxed or not host else []
    if host:
        parts += [tables_host.caption(host), table(tables_host.HEAD, tables_host.rows(host))]
    return "\n\n".join(parts)


def by_machine(records: Sequence[Record]) -> list[list[Record]]:
    """The records of the model, and apart from them those of the page if these were measured elsewhere."""
    page = [record for record in records if record["bench"] in OF_THE_PAGE]
    model = [record for record in records if record["bench"] not in OF_THE_PAGE]
    elsewhere = bool(page and model) and any(page[0].get(name) != model[0].get(name) for name in ("machine", "versions"))
    return [model, page] if elsewhere else [list(records)]


def render_boxed(records: Sequence[Record], results: str) -> list[str]:
    """What was measured on the model in the box, both tables with their sentences.

    Raises:
        BenchError: no records, or records of different machines, models or requests.
    """
    check_one_origin(records)
    speedups = [record for record in records if record["bench"] == "speedup"]
    others = [row for name, rows in ROWS.items() for record in records if record["bench"] == name for row in rows(record)]
    parts = [origin(records, results)]
    if speedups:
        parts += [speedup_caption(speedups[0]), table(SPEEDUP_HEAD, [speedup_row(record) for record in speedups])]
    if others:
        parts.append(table(("what", "measured"), others))
    return parts


def check_one_origin(records: Sequence[Record]) -> None:
    """Raise BenchError unless one sentence can say where all records come from."""
    if not records:
        raise BenchError("the results file holds no records; `python -m analysis bench` writes them")
    for name in ("machine", "versions", "dtype", "model", "steps", "sampler", "guidance", "prompt", "seed"):
        if any(record.get(name) != records[0].get(name) for record in records):
            raise BenchError(f"the records differ in {name}, so one table cannot hold them; run the whole bench again")


def origin(records: Sequence[Record], results: str) -> str:
    """Hardware, versions, model and request, and the commands that made the tables."""
    first = records[0]
    machine, versions = first["machine"], first["versions"]
    commits = ", ".join(sorted({f"`{record['commit']}`" if record["commit"] else "unknown" for record in records}))
    dates = ", ".join(sorted({record["date"] for record in records}))
    return (
        f"Measured on {machine['cpu']} ({machine['cores']} cores, {machine['torch_threads']} torch threads), "
        f"python {versions['python']}, torch {versions['torch']}, diffusers {versions['diffusers']}, {first['dtype']}, "
        f'with the model in the box ({first["model"]}): prompt "{first["prompt"]}", seed {first["seed"]}, '
        f"{first['steps']} {first['sampler']} steps, guidance {first['guidance']:g}. "
        f"`python -m analysis bench` wrote [`{results}`]({results}) (commit {commits}, {dates}), "
        "and `python -m analysis tables` made these tables from it."
    )


def speedup_caption(record: Record) -> str:
    """What the columns of the first table mean."""
    return (
        f"Seconds are of the whole pipeline call: the baseline takes {seconds(record['baseline_seconds'])}. "
        f"*Measured*, over {record['repeats']} interleaved rounds, is {TOLD}; *ideal* counts blocks (the control's counts "
        f"steps). Window {record['window_start']:.2f} to {record['window_end']:.2f}, {record['num_blocks']} blocks. The "
        f"difference from the baseline is the mean over {len(record['difference_prompts'])} prompts of {record['lpips_name']}, "
        "0 for equal pictures, and SSIM, 1 for equal pictures; it is not a quality."
    )


def speedup_row(record: Record) -> list[str]:
    fewer, ours = record["fewer_steps"], speedup_in(record)
    return [
        str(record["reuse_interval"]),
        str(record["cutoff_block"]),
        f"{record['speedup_ideal']:.2f}x",
        str(ours),
        ours.of(record["speedup_ideal"]),
        difference(record),
        f"{fewer['steps']} steps, ideal {fewer['speedup_ideal']:.2f}x",
        str(speedup_in(fewer)),
        difference(fewer),
    ]


def difference(found: Record) -> str:
    return f"{found['lpips']:.5f} / {found['ssim']:.4f}"


def overhead_rows(record: Record) -> list[list[str]]:
    return [["`accelerate` with N = 1, over the plain call", overhead(record)]]


def observe_rows(record: Record) -> list[list[str]]:
    return [["`observe`, over the plain call", overhead(record)]]


def overhead(record: Record) -> str:
    """The median of the paired ratios as a percentage more, and their quartiles."""
    low, high = record["ratio_paired_quartiles"]
    spent = f"median of {record['repeats']} paired ratios, quartiles {percent(low)} to {percent(high)}"
    return f"{percent(record['ratio_paired'])} ({spent})"


def slider_rows(record: Record) -> list[list[str]]:
    low, high = record["seconds_quartiles"]
    replayed = f"{record['replayed_steps']} of {record['steps']} steps replayed"
    spent = f"{seconds(record['seconds'])} (median of {record['repeats']}, quartiles {seconds(low)} to {seconds(high)})"
    share = f"{record['ratio_paired']:.2f} of the baseline's {seconds(record['baseline_seconds'])}"
    return [[f"a new setting with a known baseline, {replayed}, figures included", f"{spent}, {share}"]]


def app_rows(record: Record) -> list[list[str]]:
    remembered = f"{seconds(record['remembered_seconds'])} (median of {record['repeats']})"
    first = f"the first time {seconds(record['first_seconds'])}, everything computed"
    started = f"{seconds(record['start_seconds'])} (median of {record['starts']})"
    return [
        ["a comparison the app remembers, asked over HTTP", f"{remembered}; {first}"],
        ["`python app.py` to an answering page", started],
    ]


def visitors_rows(record: Record) -> list[list[str]]:
    swap = f"{seconds(record['swap_seconds'])} (median of {record['swaps']}; slowest {seconds(record['swap_seconds_slowest'])})"
    alone = f"{seconds(record['alone_seconds'])}, 95 % within {seconds(record['alone_seconds_95'])}"
    busy = f"{seconds(record['busy_seconds'])}, 95 % within {seconds(record['busy_seconds_95'])}"
    memory = [(read["runs"], f"{read['bytes'] / 2**20:.0f} MiB") for read in record["resident_bytes"]]
    asked = f"{record['visitors']} visitors at once asking for the page and the atlas, per request"
    return [
        ["a move of a slider within the atlas, to the new picture in a browser", swap],
        [asked, f"{alone} (median of {record['requests']})"],
        ["the same while another visitor draws", busy],
        ["memory of the app after so many different runs", "; ".join(f"{runs}: {held}" for runs, held in memory)],
    ]


def cache_rows(record: Record) -> list[list[str]]:
    tensor = f"one {record['dtype']} tensor of {record['tokens']} tokens by {record['width']} values"
    return [["cache, per guidance branch", f"{record['cache_bytes_per_branch']:,} bytes: {tensor}"]]


ROWS: dict[str, Callable[[Record], list[list[str]]]] = {
    "overhead": overhead_rows,
    "observe": observe_rows,
    "slider": slider_rows,
    "app": app_rows,
    "visitors": visitors_rows,
    "cache": cache_rows,
}


OF_THE_PAGE = ("app", "visitors")
"""Benches of the page, which take longest and may be measured at another time."""


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def seconds(value: float) -> str:
    return f"{value:.3f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
