"""A start for training: the planner's schedules, which know the model, and how hard each picture is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdance.ada.policy import AdaPolicy
from blockdance.errors import ConfigError
from blockdance.frontier import Frontier
from blockdance.policy import Moment
from blockdance.profile import Expected, Profile
from blockdance.schedule import Schedule, StepKind

SMOOTHING = 0.15
"""How probable the other kind shall be on every step, so that training still tries it."""
UPDATES = 500
BATCH = 16
PROBES = (0.4, 0.6)
"""Savings at which it is found out how hard a picture is."""
SMALLEST_LOSS = 1e-7


class Teacher:
    """The planner's schedules of a policy's savings, with reuse only where the policy decides.

    Raises:
        ConfigError: the profile knows none of the policy's cutoffs.
    """

    def __init__(self, profile: Profile, policy: AdaPolicy) -> None:
        known = [block for block in policy.cutoffs if block in profile.blocks]
        if not known:
            raise ConfigError(
                f"cutoffs must be among the profile's blocks {profile.blocks} to start from, got {policy.cutoffs}"
            )
        self.profile, self.policy, self.blocks = profile, policy, known
        self.frontier = cache(self._frontier)

    def _frontier(self, num_steps: int) -> Frontier:
        every = self.profile.expected(num_steps)
        some = Expected(
            {block: every.products[block] for block in self.blocks}, {block: every.sensitivity[block] for block in self.blocks}
        )
        first = self.policy.decides_at(num_steps) or num_steps
        return Frontier(some, num_steps, self.profile.num_blocks, self.policy.storage, first)

    def schedule(self, saving: float, num_steps: int) -> Schedule:
        """The schedule with the least expected change that reuses on about this share of the steps decided on."""
        frontier = self.frontier(num_steps)
        decided = num_steps - (self.policy.decides_at(num_steps) or num_steps)
        return frontier.schedule(min(frontier.most, round(saving * decided) * (self.blocks[-1] + 1)))


@dataclass(frozen=True)
class Examples:
    """Pictures with one number of steps, and how hard each of them is."""

    moment: Moment
    """b samples."""
    hardness: Tensor
    """How much less than the mean picture each should save, (b,)."""


def hardness_of(qualities: Tensor) -> Tensor:
    """How much less each picture should save, so that one more reuse step costs the same quality in all.

    Quality falls exponentially with the saving, at about the same rate for all pictures, so where e times as much is lost
    the saving is to be less by what makes the loss grow by e.

    Args:
        qualities: of b pictures at the savings in PROBES, (b, 2), below 0.
    """
    losses = qualities.abs().clamp_min(SMALLEST_LOSS).log()
    rate = ((losses[:, 1] - losses[:, 0]).mean() / (PROBES[1] - PROBES[0])).clamp_min(1.0)
    level = losses.mean(dim=1)
    return (level - level.mean()) / rate


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
        kinds, cutoffs = targets(teacher, given, moment.num_steps)
        logits, which = (part.cpu() for part in policy.network(moment, first, wanted))
        smooth = SMOOTHING + (1 - 2 * SMOOTHING) * kinds
        loss = F.binary_cross_entropy_with_logits(logits, smooth)
        loss = loss + F.cross_entropy(which.flatten(0, 1), cutoffs.flatten(), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def some_of(moment: Moment, chosen: Tensor) -> Moment:
    """These samples."""
    text, mask = [None if one is None else one[chosen] for one in (moment.text, moment.text_mask)]
    return Moment(moment.latent[chosen], text, mask, moment.num_steps)


def targets(teacher: Teacher, wanted: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """1 where the teacher does not reuse, and the place of its cutoff, (b, decided steps) each."""
    policy = teacher.policy
    first = policy.decides_at(num_steps) or num_steps
    schedules = [teacher.schedule(float(saving), num_steps) for saving in wanted]
    decided = range(first, num_steps)
    kinds = [[float(one[step] is not StepKind.REUSE) for step in decided] for one in schedules]
    deepest = list(policy.cutoffs).index(teacher.blocks[-1])
    places = [
        [list(policy.cutoffs).index(one.cutoff_at(step)) if one[step] is StepKind.REUSE else deepest for step in decided]
        for one in schedules
    ]
    return torch.tensor(kinds), torch.tensor(places)
