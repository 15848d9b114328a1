"""Policy gradient (REINFORCE) over the schedules of single pictures (Sec. 3.3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from blockdance.errors import ConfigError

BASELINES = ("none", "self-critical", "leave-one-out")
"""What is subtracted from a reward: nothing, as in the paper; the reward of the greedy schedule; the mean of the others', and
then all of a scene is divided by its spread, so that scenes with large differences do not drown the rest."""
SMALLEST_SPREAD = 1e-4
SPREAD = 0.3
"""Of wanted savings."""


@dataclass(frozen=True)
class Tried:
    """Schedules that were drawn at random for some scenes, (scenes, rollouts, steps) each."""

    is_cache: Tensor
    """1 for a cache step."""
    cutoffs: Tensor
    """Places in the list of cutoffs."""


def try_some(logits: Tensor, cutoffs: Tensor, rollouts: int, generator: torch.Generator) -> Tried:
    """Draw schedules from the policy's probabilities.

    Args:
        logits: of a cache step, (scenes, steps).
        cutoffs: logits of each cutoff, (scenes, steps, cutoffs).
        rollouts: how many for each scene.
        generator: of the chance.
    """
    keeps = logits.detach().sigmoid()[:, None].expand(-1, rollouts, -1)
    chances = cutoffs.detach().softmax(dim=-1)
    picked = torch.multinomial(chances.flatten(0, 1), rollouts, replacement=True, generator=generator)
    return Tried(torch.bernoulli(keeps, generator=generator), picked.unflatten(0, chances.shape[:2]).transpose(1, 2))


def log_probability(logits: Tensor, cutoffs: Tensor, tried: Tried) -> Tensor:
    """Of whole schedules, (scenes, rollouts); a cutoff counts on reuse steps alone."""
    keep = Bernoulli(logits=logits[:, None]).log_prob(tried.is_cache)
    which = Categorical(logits=cutoffs[:, None]).log_prob(tried.cutoffs)
    return (keep + (1 - tried.is_cache) * which).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Of the choice between the kinds, in nats a step, mean over steps and scenes."""
    return Bernoulli(logits=logits).entropy().mean()


def advantages(rewards: Tensor, baseline: str, greedy: Tensor | None = None) -> Tensor:
    """How much better each schedule did than a baseline says.

    Args:
        rewards: (scenes, rollouts).
        baseline: one of BASELINES.
        greedy: the greedy schedules' rewards, (scenes,), for the self-critical one.

    Raises:
        ConfigError: no such baseline, or leave-one-out with a single rollout.
    """
    if baseline == "none":
        return rewards
    if baseline == "self-critical" and greedy is not None:
        return rewards - greedy[:, None]
    if baseline == "leave-one-out" and rewards.shape[1] > 1:
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        return (rewards - others) / (rewards.std(dim=1, keepdim=True) + SMALLEST_SPREAD)
    raise ConfigError(
        f"baseline must be one of {', '.join(BASELINES)}, and leave-one-out needs at least 2 rollouts, "
        f"got {baseline!r} with {rewards.shape[1]}"
    )


def policy_loss(logits: Tensor, cutoffs: Tensor, tried: Tried, advantage: Tensor) -> Tensor:
    """Its gradient is minus that of the expected reward."""
    return -(advantage.detach() * log_probability(logits, cutoffs, tried)).mean()


class Price:
    """lambda, the weight of quality in the reward C + lambda Q, as a function of the wanted saving.

    Dual ascent: where more is saved than was wanted, quality gets dearer, until the mean saving is the wanted one. The
    logarithm of lambda is a parabola in the wanted saving, one for each number of steps.
    """

    def __init__(self, start: float, rate: float = 0.5) -> None:
        self.start, self.rate = start, rate
        self.coefficients: dict[int, Tensor] = {}

    def __call__(self, wanted: Tensor, num_steps: int) -> Tensor:
        return self.start * (features(wanted) @ self._of(num_steps)).exp()

    def expect(self, num_steps: int, middle: float, fall: float) -> None:
        """Begin with this price at a wanted saving of a half, and a logarithm that falls by `fall` from 0 to 1."""
        self.coefficients[num_steps] = torch.tensor([math.log(middle / self.start), -fall * SPREAD, 0.0])

    def learn(self, wanted: Tensor, saving: Tensor, num_steps: int) -> None:
        """Savings that were had where `wanted` was wanted, (n,) both."""
        change = ((saving - wanted)[:, None] * features(wanted)).mean(dim=0)
        self.coefficients[num_steps] = self._of(num_steps) + self.rate * change

    def _of(self, num_steps: int) -> Tensor:
        return self.coefficients.get(num_steps, torch.zeros(3))


def features(wanted: Tensor) -> Tensor:
    """(n, 3)."""
    centred = (wanted - 0.5) / SPREAD
    return torch.stack([torch.ones_like(centred), centred, centred.square() - 1], dim=-1)
