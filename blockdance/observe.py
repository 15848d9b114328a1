"""Measure where features repeat: each block's output against its own output one step earlier (the paper's Fig. 2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdance.adapters import guidance_rows
from blockdance.errors import SessionError
from blockdance.session import ModelCall, Part, Session, joined


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


class Observer(Part):
    """Fills an observation; holds the last output of every block, per call of the transformer."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation

    def begin_run(self, session: Session) -> None:
        self.session = session
        self.observation.num_steps = session.num_steps
        self.observation._cosine.clear()
        self.observation._change.clear()
        self._previous: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._measured: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def after_block(self, call: ModelCall, index: int, output: Tensor) -> None:
        if call.stage:
            return
        place, current = (call.branch, index), output.detach().clone()
        step, previous = self._previous.get(place, (-1, None))
        if previous is None or step != call.step - 1 or previous.shape != current.shape:
            previous = torch.full_like(current, torch.nan)
        self._measured[place] = compare(previous, current)
        self._previous[place] = (call.step, current)

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        for call in (call for call in calls if not call.stage):
            pairs = [self._measured.get((call.branch, index)) for index in range(self.session.num_blocks)]
            known = next((pair for pair in pairs if pair is not None), None)
            if known is None:
                continue
            missing = torch.full_like(known[0], torch.nan)
            cosine = torch.stack([missing if pair is None else pair[0] for pair in pairs])
            change = torch.stack([missing if pair is None else pair[1] for pair in pairs])
            rows = guidance_rows(self.session.transformer, call.branch, call.kwargs, cosine.shape[1], sample_rows)
            for branch, part in rows.items():
                self.observation._cosine.setdefault(branch, {})[step] = cosine[:, part]
                self.observation._change.setdefault(branch, {})[step] = change[:, part]
        self._measured.clear()


def compare(previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample: cosine similarity (mean over tokens) and relative L2 change of two hidden states (b, t, d) -> (b,), (b,)."""
    before, now = previous.float(), current.float()
    cosine = F.cosine_similarity(before, now, dim=-1).mean(dim=1)  # (b,)
    change = (now - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)  # (b,)
    return cosine, change


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
