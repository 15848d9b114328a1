"""Measure where features repeat: each block's output against its own output one step earlier (the paper's Fig. 2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from blockdance.adapters import Streams, guidance_rows, has_null_half
from blockdance.errors import ScheduleError, SessionError
from blockdance.part import ModelCall, Part, Run
from blockdance.scheduled import joined

SMALLEST = 1e-16
"""A token without length has cosine 0 with any other, not NaN, which means that nothing was compared."""


@dataclass
class Observation:
    """Similarity of adjacent steps, per guidance branch, block, step and sample.

    Branches are named `conditional` and `unconditional` (without guidance there is only `conditional`). Entries are NaN
    where there is nothing to compare: at step 0, and where a block was skipped at this step or the one before.
    """

    num_blocks: int
    num_steps: int = 0
    _cosine: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _change: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _features: dict[tuple[str, int], dict[int, Tensor]] = field(default_factory=dict)

    @property
    def branches(self) -> list[str]:
        """The guidance branches seen, the conditional one first."""
        return sorted(self._cosine)

    def cosine(self, branch: str = "conditional") -> Tensor:
        """Cosine similarity, mean over tokens, in [-1, 1], float32 (num_blocks, num_steps, samples)."""
        return self._matrix(self._cosine, branch)

    def relative_change(self, branch: str = "conditional") -> Tensor:
        """||h_t - h_(t-1)|| / ||h_(t-1)|| over all tokens, >= 0, float32 (num_blocks, num_steps, samples)."""
        return self._matrix(self._change, branch)

    def features(self, block: int, branch: str = "conditional") -> Tensor:
        """The output of a block that `observe` was asked to keep, (num_steps, samples, tokens, width), on the CPU.

        Raises:
            SessionError: the block was not kept, or did not run on every step.
        """
        seen = self._features.get((branch, block), {})
        if not seen or len(seen) != self.num_steps:
            raise SessionError(f"block must be one that was kept and ran on every step, got {block!r} of branch {branch!r}")
        return torch.stack([seen[step] for step in range(self.num_steps)])

    def _matrix(self, source: dict[str, dict[int, Tensor]], branch: str) -> Tensor:
        if branch not in source:
            raise SessionError(f"branch must be one of {self.branches}, got {branch!r}")
        seen = source[branch]
        missing = torch.full_like(next(iter(seen.values())), torch.nan)
        return torch.stack([seen.get(step, missing) for step in range(self.num_steps)], dim=1).cpu()


@dataclass(slots=True)
class Held:
    """The last output of a block, and of each of its tokens the three lengths that compare it with the one a step before.

    Lengths are L2 norms, float32 (b, t); NaN where there is nothing to compare.
    """

    step: int
    output: Tensor
    """Our own copy, (b, t, d)."""
    lengths: Tensor
    lengths_before: Tensor
    moved: Tensor
    """Of the difference."""


class Observer(Part):
    """Fills an observation; holds the last output of every block, per call of the transformer.

    Per block as few operations as possible, since on a small model they are most of what observing costs; the rest is
    done once a step for all blocks together.
    """

    needs_whole_batches = True
    needs_blocks = True

    def __init__(self, observation: Observation, keep_blocks: Sequence[int] = ()) -> None:
        self.observation = observation
        self.keep_blocks = keep_blocks

    def begin_run(self, run: Run) -> None:
        self.resize_run(run)
        self._null_halves: dict[int, tuple[Any, bool]] = {}
        """By their address, class labels and whether half of them are null; read once, as that waits for their device."""
        self.observation._cosine.clear()
        self.observation._change.clear()
        self.observation._features.clear()
        self._held: dict[tuple[int, int, int], Held] = {}

    def resize_run(self, run: Run) -> None:
        self.observation.num_steps, self.observation.num_blocks = run.num_steps, run.num_blocks

    def _null_half(self, call: ModelCall) -> bool:
        labels = call.kwargs.get("class_labels")
        if id(labels) not in self._null_halves:
            self._null_halves[id(labels)] = labels, has_null_half(call.denoiser.transformer, call.kwargs)
        return self._null_halves[id(labels)][1]

    def watches_blocks(self, call: ModelCall) -> bool:
        return not call.stage

    def blocks_after(self, call: ModelCall) -> range:
        return range(call.denoiser.num_blocks)

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        image = outputs[call.denoiser.blocks[index].image].detach()
        place, current = (call.expert, call.branch, index), image.reshape(call.rows, -1, image.shape[-1])
        held = self._held.get(place)
        if held is None or held.step != call.step - 1 or held.output.shape != current.shape:
            unknown = torch.full_like(current, torch.nan)
            held = self._held[place] = Held(call.step, unknown, *[token_lengths(unknown)] * 3)
        held.step, held.lengths_before = call.step, held.lengths
        held.moved = token_lengths(held.output.sub_(current))
        held.lengths = token_lengths(held.output.copy_(current))

    def drop_branch(self, expert: int, branch: int) -> None:
        for place in [place for place in self._held if place[:2] == (expert, branch)]:
            del self._held[place]

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        for call in (call for call in calls if not call.stage):
            ours = (call.expert, call.branch)
            fresh = {place[2]: held for place, held in self._held.items() if (place[:2], held.step) == (ours, step)}
            if not fresh:
                continue
            cosine, change = compare(fresh, self.observation.num_blocks)
            denoiser, half = call.denoiser, self._null_half(call)
            rows = guidance_rows(denoiser.transformer, denoiser.stack, call.branch, call.kwargs, call.rows, sample_rows, half)
            for branch, part in rows.items():
                self.observation._cosine.setdefault(branch, {})[step] = cosine[:, part]
                self.observation._change.setdefault(branch, {})[step] = change[:, part]
                for index in fresh.keys() & set(self.keep_blocks):
                    states = fresh[index].output[part].cpu().clone()
                    self.observation._features.setdefault((branch, index), {})[step] = states


def token_lengths(states: Tensor) -> Tensor:
    """The L2 norm of every token, float32 (b, t)."""
    return vector_norm(states, dim=-1, dtype=torch.float32)


def compare(fresh: dict[int, Held], num_blocks: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity, mean over tokens, and relative L2 change, (num_blocks, b) each; NaN for a block that is not given.

    Blocks with equally many tokens (in most models all) are compared in one go.
    """
    any_held = next(iter(fresh.values()))
    cosine, change = torch.full((2, num_blocks, len(any_held.moved)), torch.nan, device=any_held.moved.device)
    for tokens in {held.moved.shape for held in fresh.values()}:
        same = {index: held for index, held in fresh.items() if held.moved.shape == tokens}
        before = torch.stack([held.lengths_before for held in same.values()])
        now = torch.stack([held.lengths for held in same.values()])
        moved = torch.stack([held.moved for held in same.values()])
        cosine[list(same)] = cosine_of_sides(before, now, moved).mean(dim=-1)
        change[list(same)] = vector_norm(moved, dim=-1) / vector_norm(before, dim=-1)
    return cosine, change


def cosine_of_sides(before: Tensor, now: Tensor, moved: Tensor) -> Tensor:
    """The cosine of the angle between two sides of a triangle, from its three lengths.

    For nearly equal vectors this is far more exact than their product over their lengths: what is subtracted from 1 is small.
    """
    product = before * now
    return torch.where(product <= SMALLEST, 0, 1 - (moved.square() - (before - now).square()) / (2 * product))


@contextmanager
def observe(pipe: Any, *, keep_blocks: Sequence[int] = ()) -> Iterator[Observation]:
    """Record the similarity of adjacent steps for the last run inside; nests with `accelerate` and `record`.

    Streaming: at most one step of hidden states is held, but for the blocks to keep.

    Args:
        pipe: a diffusers pipeline with a supported transformer.
        keep_blocks: blocks whose output on every step is kept, for `Observation.features` (the paper's Fig. 3).

    Yields:
        The observation, complete when the run is.

    Raises:
        ScheduleError: a block to keep that the transformer does not have.
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    observation = Observation(num_blocks=0)
    with joined(pipe, Observer(observation, keep_blocks)) as session:
        observation.num_blocks = session.num_blocks
        strange = [block for block in keep_blocks if not 0 <= block < session.num_blocks]
        if strange:
            raise ScheduleError(f"keep_blocks must be in [0, {session.num_blocks - 1}], got {strange[0]}")
        yield observation
