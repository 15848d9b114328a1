"""What BlockDance costs the host: a loop around blocks that do nothing, so that Python is all that is timed.

A pipeline's loop (guidance in two calls, a scheduler that ends each step) is timed with `LOOP_STEPS` steps of one kind, plainly
and inside `accelerate`. Entering `accelerate` is not in it, the beginning of each run is. The same loop around fewer blocks, of
which as large a share is skipped, tells what a block costs, and what a step costs apart from its blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.records import Record
from analysis.stopwatch import interleaved, seconds_of, spread
from blockdance import Schedule, accelerate

LOOP_STEPS = 50
"""Of every timed loop, an even number."""
CALLS = 2
"""Of the transformer in a step."""
DEEP, SHALLOW = (28, 20), (4, 2)
"""Blocks, and the cutoff block: three quarters are skipped in both."""
ROUNDS = 5
"""Times as many rounds as a bench that times whole pictures."""
ALTERNATING = "cr" * (LOOP_STEPS // 2)
REUSING = "c" + "r" * (LOOP_STEPS - 1)
LOOPS = {
    "plain": "",
    "full": "f" * LOOP_STEPS,
    "full, where others reuse": "cr" + "f" * (LOOP_STEPS - 2),
    "alternating": ALTERNATING,
    "reuse": REUSING,
}
"""The schedules that are timed; the plain loop has none."""
KINDS = {"plain": "", "full": LOOPS["full"], "full, where others reuse": LOOPS["full, where others reuse"]} | {
    "cache": ALTERNATING,
    "reuse": REUSING,
}
"""What is told, by the schedule it follows from. A cache step stores only what a reuse step asks for, so its cost is what the
alternating loop takes beyond its reuse steps."""

Loops = Mapping[tuple[str, int], Sequence[float]]
"""Seconds of every round, by a key of LOOPS and the number of blocks."""
Microseconds = NDArray[np.float64]
"""Of every round, (rounds,)."""


class IdleBlock(nn.Module):
    """Puts out what it is given."""

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        return hidden_states


class PixArtTransformer2DModel(nn.Module):
    """Idle blocks in a row, under a name for which there is an adapter."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(IdleBlock() for _ in range(num_blocks))
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # a transformer has a device

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> tuple[Tensor]:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, timestep=timestep)
        return (hidden_states,)


class IdleScheduler:
    """Counts steps, and hands the model's output on."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps).flip(0)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        return (model_output,)


class IdlePipeline:
    """The loop that all pipelines share."""

    def __init__(self, num_blocks: int) -> None:
        self.transformer = PixArtTransformer2DModel(num_blocks)
        self.scheduler = IdleScheduler()
        self.latent = torch.zeros(1, 1, 1)

    @torch.no_grad()
    def __call__(self, steps: int) -> Tensor:
        """The latent after that many steps."""
        latent = self.latent
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            (conditional,) = self.transformer(latent, timestep=timestep)
            self.transformer(latent, timestep=timestep)
            (latent,) = self.scheduler.step(conditional, timestep, latent)
        return latent


def loop_seconds(pipe: IdlePipeline, letters: str, cutoff_block: int) -> float:
    """Seconds of one loop, after an untimed one that pays for what happens once in an `accelerate`."""
    with accelerate(pipe, Schedule.parse(letters, cutoff_block)) if letters else nullcontext():
        pipe(LOOP_STEPS)
        return seconds_of(partial(pipe, LOOP_STEPS))


def measure_host(repeats: int) -> list[Record]:
    """One line for each of KINDS.

    Args:
        repeats: a fifth of the rounds.
    """
    runs: dict[tuple[str, int], Callable[[], float]] = {}
    for num_blocks, cutoff_block in (DEEP, SHALLOW):
        pipe = IdlePipeline(num_blocks)
        for name, letters in LOOPS.items():
            runs[name, num_blocks] = partial(loop_seconds, pipe, letters, cutoff_block)
    loops = interleaved(runs, ROUNDS * repeats, "host", timed=lambda run: run())
    return [host_line(kind, loops) for kind in KINDS]


def host_line(kind: str, loops: Loops) -> Record:
    """What a kind of step takes, and what of that is beyond the plain pipeline's."""
    deep, shallow = (step_costs(kind, loops, num_blocks) for num_blocks, _ in (DEEP, SHALLOW))
    plain_deep, plain_shallow = (step_costs("plain", loops, num_blocks) for num_blocks, _ in (DEEP, SHALLOW))
    about = {"kind": kind, "schedule": KINDS[kind], "cutoff_block": DEEP[1], "num_blocks": DEEP[0]}
    about |= {"loop_steps": LOOP_STEPS, "calls_per_step": CALLS, "repeats": len(deep)}
    beyond = costs("beyond_", deep - plain_deep, shallow - plain_shallow) if kind != "plain" else {}
    return about | costs("", deep, shallow) | beyond


def step_costs(kind: str, loops: Loops, num_blocks: int) -> Microseconds:
    """Of one step of that kind, in every round."""
    if kind == "cache":
        return 2 * step_costs("alternating", loops, num_blocks) - step_costs("reuse", loops, num_blocks)
    return np.array(loops[kind, num_blocks]) / LOOP_STEPS * 1e6


def costs(prefix: str, deep: Microseconds, shallow: Microseconds) -> Record:
    """Medians and quartiles of a step, of one call of one block in it, skipped ones counted, and of the step without blocks.

    Args:
        prefix: of the names.
        deep: of a step with as many blocks as DEEP has.
        shallow: of a step with as many as SHALLOW has.
    """
    block = (deep - shallow) / (CALLS * (DEEP[0] - SHALLOW[0]))
    told = {"step": deep, "block": block, "outside": deep - CALLS * DEEP[0] * block}
    return {
        name: value
        for what, values in told.items()
        for name, value in spread(f"{prefix}{what}_microseconds", values.tolist()).items()
    }
