"""One harness for BlockDance and what a user would pick instead: same model, prompts, seeds, sampler and steps."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from analysis.experiment import Request, sample, with_sampler
from analysis.memory import peak_bytes
from analysis.metrics import PerceptualDistance, difference
from analysis.optional_rivals import check_installed
from analysis.pictures import Picture
from analysis.records import RESULTS, BenchError, Record, append_records, provenance, read_records
from analysis.rivals import METHODS, Method
from analysis.stopwatch import seconds_of

PROMPTS = Path(__file__).with_name("prompts.txt")
COMPARE_RESULTS = RESULTS.with_name("compare.jsonl")
KEY = ("method", "knob", "prompt", "seed", "steps")
"""What tells one line from another; it is not computed again while the results file has it."""

Setting = tuple[str, str]
"""A method and its knob."""
PLAIN = Method("", (), lambda *_: nullcontext())
"""The baseline, as a method."""


class MacCounter:
    """Counts the multiply-accumulates of the linear layers in a transformer's blocks, of those that really run."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.total = 0
        layers = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
        self._hooks = [layer.register_forward_pre_hook(self._count) for layer in layers]

    def _count(self, layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        self.total += args[0].numel() * layer.out_features

    def remove(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()


def draw(pipe: Any, request: Request, method: Method = PLAIN, knob: str = "") -> tuple[Picture, float]:
    """One run: the picture, and the seconds of the pipeline's call alone."""
    asked = replace(request, steps=method.steps(request, knob))
    pictures: list[Picture] = []
    with method.applied(pipe, asked, knob):
        seconds = seconds_of(lambda: pictures.append(sample(pipe, asked)))
    return pictures[0], seconds


def draw_counted(pipe: Any, request: Request, method: Method = PLAIN, knob: str = "") -> tuple[Picture, int]:
    """One run: the picture, and the multiply-accumulates in the blocks."""
    if method.prepare is not None:
        method.prepare(pipe, request)
    counter = MacCounter(pipe.transformer.transformer_blocks)
    try:
        return draw(pipe, request, method, knob)[0], counter.total
    finally:
        counter.remove()


def check_methods(pipe: Any, request: Request, names: Sequence[str]) -> None:
    """Each method must skip work at its strongest setting, do the same twice, and leave the model as it was.

    Raises:
        BenchError: one does not.
    """
    plain, whole = draw_counted(pipe, request)
    classes = [type(module) for module in pipe.transformer.modules()]
    for name in names:
        method = METHODS[name]
        strongest = method.sweep[-1]
        first, macs = draw_counted(pipe, request, method, strongest)
        again = draw(pipe, request, method, strongest)[0]
        after = draw(pipe, request)[0]
        if macs >= whole:
            raise BenchError(f"{name} skips nothing at {strongest}, so its figures would mean nothing")
        if not np.array_equal(first, again):
            raise BenchError(f"{name} draws another picture the second time, so something is left of the first")
        if not np.array_equal(plain, after) or classes != [type(module) for module in pipe.transformer.modules()]:
            raise BenchError(f"{name} leaves the model changed")


def read_prompts(file: Path = PROMPTS) -> list[str]:
    """One prompt a line."""
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def compare(
    pipe: Any, requests: Sequence[Request], names: Sequence[str], distance: PerceptualDistance, out: Path
) -> list[Record]:
    """Draw every request with every method at every setting, and write one line for each; what the file has is kept.

    Under `accelerate launch` the requests are shared out among the processes, and the first one writes.

    Args:
        pipe: the pipeline.
        requests: they differ in prompt and seed alone.
        names: keys of METHODS.
        distance: the perceptual distance.
        out: results file; a comparison that was cut off goes on where it was.

    Returns:
        All lines of the file.

    Raises:
        BenchError: no such method, one that does not work here, or a file that cannot be read.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise BenchError(f"methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")
    for name in names:
        check_installed(METHODS[name].package)
    processes = PartialState()
    view = with_sampler(pipe, requests[0].sampler)
    lines = read_records(out) if out.exists() else []
    processes.wait_for_everyone()
    known = {tuple(line[name] for name in KEY) for line in lines}
    settings = [(name, knob) for name in names for knob in METHODS[name].sweep]
    missing = {
        request: left
        for request in requests
        if (left := [(name, knob) for name, knob in settings if key_of(request, name, knob) not in known])
    }
    if not missing:
        return lines
    wanted = list(dict.fromkeys(setting for left in missing.values() for setting in left))
    check_methods(view, requests[0], sorted({name for name, _ in wanted}))
    peaks = {(name, knob): peak_of(view, requests[0], name, knob) for name, knob in wanted}
    todo = [(request, left if turn % 2 else left[::-1]) for turn, (request, left) in enumerate(missing.items())]
    with tqdm(total=len(todo), desc="compare", unit="prompt", disable=not processes.is_main_process) as bar:
        for first in range(0, len(todo), processes.num_processes):
            together = todo[first : first + processes.num_processes]
            mine = together[processes.process_index : processes.process_index + 1]
            fresh = gather_object([line for one in mine for line in compare_one(view, *one, distance, peaks)])
            lines += fresh
            if processes.is_main_process:
                append_records(out, fresh)
            bar.update(len(together))
    return lines


def peak_of(pipe: Any, request: Request, name: str, knob: str) -> int:
    """The most bytes that tensors of one run take; it does not depend on the prompt."""
    return peak_bytes(lambda: draw(pipe, request, METHODS[name], knob))


def compare_one(
    pipe: Any, request: Request, settings: Sequence[Setting], distance: PerceptualDistance, peaks: Mapping[Setting, int]
) -> list[Record]:
    """The lines of one request: pictures and costs first, then every setting and the baseline timed in one round."""
    baseline, whole = draw_counted(pipe, request)
    drawn = {(name, knob): draw_counted(pipe, request, METHODS[name], knob) for name, knob in settings}
    baseline_seconds = draw(pipe, request)[1]
    seconds: dict[Setting, float] = {}
    for name, knob in settings:
        picture, seconds[name, knob] = draw(pipe, request, METHODS[name], knob)
        if not np.array_equal(picture, drawn[name, knob][0]):
            raise BenchError(f"{name} at {knob} draws another picture the second time, so its figures would mean nothing")
    per_block = whole / (request.steps * len(pipe.transformer.transformer_blocks))
    common = provenance() | {"bench": "compare", "prompt": request.prompt, "seed": request.seed, "steps": request.steps}
    return [
        common
        | {"method": name, "knob": knob, "lpips_name": distance.name, "sampler": request.sampler, "guidance": request.guidance}
        | difference(baseline, picture, distance)
        | {
            "seconds": seconds[name, knob],
            "baseline_seconds": baseline_seconds,
            "speedup_measured": baseline_seconds / seconds[name, knob],
            "speedup_ideal": whole / macs,
            "macs": macs,
            "block_evaluations": macs / per_block,
            "peak_bytes": peaks[name, knob],
        }
        for (name, knob), (picture, macs) in drawn.items()
    ]


def key_of(request: Request, name: str, knob: str) -> tuple[Any, ...]:
    return name, knob, request.prompt, request.seed, request.steps
