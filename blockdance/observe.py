"""Measure where features repeat: each block's output against its own output one step earlier (the paper's Fig. 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from blockdance.adapters import guidance_rows
from blockdance.errors import SessionError
from blockdance.session import ModelCall, Part, Session, joined

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

    def _matrix(self, source: dict[str, dict[int, Tensor]], branch: str) -> Tensor:
        if branch not in source:
            raise SessionError(f"branch must be one of {self.branches}, got {branch!r}")
        seen = source[branch]
        missing = torch.full_like(next(iter(seen.values())), torch.nan)
        return torch.stack([seen.get(step, missing) for step in range(self.num_steps)], dim=1).cpu()


class Held(NamedTuple):
    """A block's last output: the step it is from, our own copy (b, t, d), and the lengths of its tokens (b, t)."""

    step: int
    output: Tensor
    lengths: Tensor


class Pair(NamedTuple):
    """What is needed of a block's outputs at adjacent steps; NaN where there is nothing to compare."""

    dots: Tensor
    """Of each token with itself one step earlier, (b, t)."""
    lengths_before: Tensor
    lengths: Tensor
    moved: Tensor
    """L2 norm of the difference, (b,)."""


class Observer(Part):
    """Fills an observation; holds the last output of every block, per call of the transformer.

    Per block as few operations as possible, since on a small model they are most of what observing costs; the rest is
    done once a step for all blocks together.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation

    def begin_run(self, session: Session) -> None:
        self.session = session
        self.observation.num_steps = session.num_steps
        self.observation._cosine.clear()
        self.observation._change.clear()
        self._held: dict[tuple[int, int], Held] = {}
        self._pairs: dict[tuple[int, int], Pair] = {}

    def watches_blocks(self, call: ModelCall) -> bool:
        return not call.stage

    def after_block(self, call: ModelCall, index: int, output: Tensor) -> None:
        place, current = (call.branch, index), output.detach()
        held = self._held.get(place)
        if held is None or held.step != call.step - 1 or held.output.shape != current.shape:
            unknown = torch.full_like(current, torch.nan)
            held = Held(call.step - 1, unknown, unknown[..., 0].float())
        before, now = held.output.float(), current.float()
        lengths = vector_norm(now, dim=-1)
        self._pairs[place] = Pair(vecdot(before, now), held.lengths, lengths, vector_norm(now - before, dim=(1, 2)))
        self._held[place] = Held(call.step, held.output.copy_(current), lengths)

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        for call in (call for call in calls if not call.stage):
            pairs = [self._pairs.get((call.branch, index)) for index in range(self.session.num_blocks)]
            known = next((pair for pair in pairs if pair is not None), None)
            if known is None:
                continue
            missing = Pair(*(torch.full_like(part, torch.nan) for part in known))
            cosine, change = compare(Pair(*map(torch.stack, zip(*(pair or missing for pair in pairs), strict=True))))
            rows = guidance_rows(self.session.transformer, call.branch, call.kwargs, cosine.shape[1], sample_rows)
            for branch, part in rows.items():
                self.observation._cosine.setdefault(branch, {})[step] = cosine[:, part]
                self.observation._change.setdefault(branch, {})[step] = change[:, part]
        self._pairs.clear()


def compare(pairs: Pair) -> tuple[Tensor, Tensor]:
    """Cosine similarity, mean over tokens, and relative L2 change, (num_blocks, b) each, of pairs stacked over blocks."""
    cosine = pairs.dots / (pairs.lengths_before * pairs.lengths).clamp_min(SMALLEST)  # (num_blocks, b, t)
    return cosine.mean(dim=-1), pairs.moved / vector_norm(pairs.lengths_before, dim=-1)


@contextmanager
def observe(pipe: Any) -> Iterator[Observation]:
    """Record the similarity of adjacent steps for the last run inside; nests with `accelerate` and `record`.

    Streaming: at most one step of hidden states is held.

    Yields:
        The observation, complete when the run is.

    Raises:
        UnsupportedModelError: the pipeline's transformer or scheduler is not supported.
    """
    observation = Observation(num_blocks=0)
    with joined(pipe, Observer(observation)) as session:
        observation.num_blocks = session.num_blocks
        yield observation
