"""A start for training: an order of the steps, from what the planner knows of the model, and how hard each picture is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdance.ada.policy import THRESHOLD, AdaPolicy
from blockdance.errors import ConfigError
from blockdance.policy import Moment
from blockdance.profile import Expected, Profile, mixing_weights
from blockdance.schedule import Schedule
from blockdance.storage import StorageRule

SOFTNESS = 1.0
"""Of the teacher's choice between cache and reuse, in steps: those near its boundary stay open, for training to try."""
UPDATES = 800
BATCH = 24
PROBES = (0.4, 0.6)
"""Savings at which it is found out how hard a picture is."""
SMALLEST_LOSS = 1e-7


class Teacher:
    """Says in which order the steps that a policy decides on should begin to reuse, as more is to be saved.

    Greedily by the change of the picture that the profile expects, so the schedules of larger savings hold those of smaller
    ones, and a network that is not sure of the saving is still sure of most steps. The planner's own schedules, which need
    not hold each other, expect up to a third less change.

    Raises:
        ConfigError: the profile does not know the policy's deepest cutoff.
    """

    def __init__(self, profile: Profile, policy: AdaPolicy) -> None:
        self.block = policy.cutoffs[-1]
        if self.block not in profile.blocks:
            raise ConfigError(
                f"the deepest cutoff must be among the profile's {profile.blocks} to start from it, got {self.block}"
            )
        self.profile, self.policy = profile, policy
        self.ranks = cache(self._ranks)

    def _ranks(self, num_steps: int) -> Tensor:
        """For every step decided on its place in the order, (decided steps,)."""
        first = self.policy.decides_at(num_steps) or num_steps
        expected, order = self.profile.expected(num_steps), list[int]()
        left = list(range(first, num_steps))
        while left:
            best = min(left, key=lambda step: expected_change(expected, self.block, {*order, step}, self.policy.storage))
            left.remove(best)
            order.append(best)
        return torch.tensor([float(order.index(step)) for step in range(first, num_steps)])

    def probabilities(self, savings: Tensor, num_steps: int) -> Tensor:
        """Of a cache step, (b, decided steps), for savings (b,)."""
        ranks = self.ranks(num_steps)
        return ((ranks + 0.5 - savings[:, None] * len(ranks)) / SOFTNESS).sigmoid()

    def schedule(self, saving: float, num_steps: int) -> Schedule:
        """The schedule that reuses on this share of the steps decided on."""
        is_cache = (self.probabilities(torch.tensor([saving]), num_steps)[0] >= THRESHOLD).tolist()
        return self.policy.schedule_of(is_cache, [len(self.policy.cutoffs) - 1] * len(is_cache), num_steps)


def expected_change(expected: Expected, block: int, reused: set[int], storage: StorageRule) -> float:
    """The change of the picture, squared, if these steps reuse."""
    steps, change, donors = len(expected.products[block]), 0.0, list[int]()
    for step in range(steps):
        if step in reused:
            change += expected.change(step, block, donors, mixing_weights(storage, donors, step)) ** 2
        else:
            donors = [*donors, step][-storage.points :]
    return change


@dataclass(frozen=True)
class Examples:
    """Pictures with one number of steps, and how hard each of them is."""

    moment: Moment
    """b samples."""
    hardness: Tensor
    """How much less than the mean picture each should save, (b,)."""


@dataclass(frozen=True)
class Losses:
    """How quality falls with the saving: exponentially, at the same rate for all pictures."""

    level: Tensor
    """The logarithm of each picture's loss at a saving of a half, (b,)."""
    rate: float
    """How much the logarithm grows from no saving to all, >= 1."""

    @classmethod
    def fitted(cls, qualities: Tensor) -> "Losses":
        """From qualities of b pictures at the savings in PROBES, (b, 2), at most 0."""
        losses = qualities.abs().clamp_min(SMALLEST_LOSS).log()
        rate = max(1.0, float((losses[:, 1] - losses[:, 0]).mean() / (PROBES[1] - PROBES[0])))
        return cls(losses.mean(dim=1), rate)

    @property
    def hardness(self) -> Tensor:
        """How much less each picture should save than the mean, so that one more reuse step costs the same in all."""
        return (self.level - self.level.mean()) / self.rate

    @property
    def price(self) -> tuple[float, float]:
        """lambda at which a saving of a half is best for the typical picture, and what its logarithm loses from 0 to 1."""
        return 1 / (self.rate * float(self.level.mean().exp())), self.rate


def imitate(teacher: Teacher, examples: Sequence[Examples], savings: tuple[float, float], generator: torch.Generator) -> float:
    """Teach the policy's network the teacher's schedules, of less saving for hard pictures, and return the last loss.

    Args:
        teacher: of the policy.
        examples: what the policy may see.
        savings: the range to draw wishes from.
        generator: of the chance.
    """
    policy, loss = teacher.policy, torch.zeros(())
    optimizer = torch.optim.Adam(policy.network.parameters(), lr=1e-3)
    for update in range(UPDATES):
        example = examples[update % len(examples)]
        chosen = torch.randint(len(example.hardness), (BATCH,), generator=generator)
        moment = some_of(example.moment, chosen)
        first = policy.decides_at(moment.num_steps)
        assert first is not None, "training sees runs that are long enough"
        wanted = savings[0] + (savings[1] - savings[0]) * torch.rand(BATCH, generator=generator)
        given = (wanted - example.hardness[chosen]).clamp(0, 1)
        logits, which = (part.cpu() for part in policy.network(moment, first, wanted))
        loss = F.binary_cross_entropy_with_logits(logits, teacher.probabilities(given, moment.num_steps))
        deepest = torch.full(logits.shape, which.shape[-1] - 1)
        loss = loss + F.cross_entropy(which.flatten(0, 1), deepest.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def some_of(moment: Moment, chosen: Tensor) -> Moment:
    """These samples."""
    text, mask = [None if one is None else one[chosen] for one in (moment.text, moment.text_mask)]
    return Moment(moment.latent[chosen], text, mask, moment.num_steps)
