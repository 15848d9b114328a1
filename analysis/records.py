"""The results file: one JSON line per measurement, each with the circumstances it was made in."""

import json
import os
import platform
import subprocess
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from analysis.experiment import Request
from analysis.machine import cpu_name
from blockdance import BlockDanceError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results" / "bench.jsonl"
COMMANDS = {
    "bench.jsonl": "bench",
    "full_size.jsonl": "bench --model MODEL",
    "compare.jsonl": "compare",
    "ada.jsonl": "ada",
    "ada_ablation.jsonl": "ada-ablation",
    "video.jsonl": "video",
    "styles.jsonl": "styles",
}
"""Of `python -m analysis`, by the name of the results file that it writes."""

Record = dict[str, Any]
"""Plain JSON values; `bench` says which measurement it is."""


class BenchError(BlockDanceError):
    """A bench cannot run, or its results cannot be used."""


def provenance() -> Record:
    """Where and with what a record was measured."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": commit(),
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()} | gpu,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "diffusers": diffusers.__version__,
        },
    }


def circumstances(pipe: Any, request: Request) -> Record:
    """Where, with what and on what a record was measured."""
    return provenance() | {
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "model": describe_model(pipe.transformer),
        "steps": request.steps,
        "sampler": request.sampler,
        "guidance": request.guidance,
        "prompt": request.prompt,
        "seed": request.seed,
    }


def describe_model(transformer: Any) -> str:
    """The transformer in one phrase: class, depth and size."""
    millions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    blocks = len(transformer.transformer_blocks)
    return f"{type(transformer).__name__}, {blocks} blocks, {millions:.1f} million parameters"


def commit() -> str | None:
    """Short hash of the checkout's commit; None where there is no git or no repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def read_records(file: Path) -> list[Record]:
    """The records of a results file, in order, but for a last line that was cut off while it was written.

    Raises:
        BenchError: no such file, or a line that is no record.
    """
    if not file.exists():
        command = COMMANDS.get(file.name)
        raise BenchError(f"{file} is missing" + (f"; `python -m analysis {command}` writes it" if command else ""))
    *lines, _ = file.read_text().split("\n")
    return [_record(line, number, file) for number, line in enumerate(lines, start=1)]


def _record(line: str, number: int, file: Path) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or "bench" not in record:
        raise BenchError(f"line {number} of {file} is not a record; remove that line to use the others")
    return record


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Replace a results file as a whole, in one stroke, so that being killed meanwhile loses nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    new.write_text("".join(json.dumps(record) + "\n" for record in records))
    new.replace(file)


def append_records(file: Path, records: Sequence[Record]) -> None:
    """Add lines to a results file; a last line that was cut off while it was written makes way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        if opened.read(1) not in (b"", b"\n"):
            opened.seek(0)
            opened.truncate(opened.read().rfind(b"\n") + 1)
        opened.write("".join(json.dumps(record) + "\n" for record in records).encode())


def kept(file: Path, measured: Collection[str]) -> list[Record]:
    """The records of an earlier bench that a new one of only `measured` leaves as they are."""
    return [record for record in read_records(file) if record["bench"] not in measured] if file.exists() else []
