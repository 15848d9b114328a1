"""A trained decision network as a policy that `accelerate` takes, and its file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from blockdance.ada.network import DecisionNetwork, Shape
from blockdance.errors import ConfigError, PolicyError
from blockdance.paths import AnyPath, written
from blockdance.policy import Decision, Moment
from blockdance.schedule import MIN_STEPS, Schedule, StepKind
from blockdance.storage import StorageRule, rule_named
from blockdance.swap import original_class

RHO = 0.4
"""The paper's: the share of the run that is over when a policy decides."""
THRESHOLD = 0.5
"""The paper's: a step is a cache step if that is at least so probable."""
WEIGHTS = 16
"""Numbers in a fingerprint, at most four of a matrix."""
TOLERANCE = 0.1
"""Relative difference up to which weights are the same ones: narrow number formats change them by up to a twentieth."""


@dataclass(frozen=True)
class PolicyConfig:
    """Everything about a policy but its weights.

    Raises:
        ConfigError: a value outside its range.
    """

    model: dict[str, Any]
    """Of which transformer it was trained for: `model_facts`."""
    cutoffs: tuple[int, ...]
    """The blocks that a reuse step may start from, ascending."""
    shape: Shape
    side: int
    """Latent pixels along a side, as trained."""
    rho: float = RHO
    """It decides after this share of the steps, in (0, 1)."""
    storage_name: str = "latest"
    """What reuse steps start from: a key of `blockdance.storage.RULES`."""
    training: dict[str, Any] = field(default_factory=dict)
    """How it was trained, and what that cost."""
    fingerprint: tuple[float, ...] | None = None
    """Some of that transformer's weights: `fingerprint_of`. None, as in older files, knows the model by `model` alone."""

    def __post_init__(self) -> None:
        check_rho(self.rho)
        if not self.cutoffs or list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise ConfigError(f"cutoffs must be ascending blocks, at least one, got {self.cutoffs!r}")
        rule_named(self.storage_name)


class AdaPolicy:
    """BlockDance-Ada: looks at the latent once, after `rho` of the steps, and decides on the rest of the run of each sample.

    Args:
        config: what it was trained for.
        network: the trained decision network.
        saving: wanted share of reuse steps among those decided on, in [0, 1]. What pictures get is about that in the mean.

    Raises:
        ConfigError: a saving outside its range.
    """

    def __init__(self, config: PolicyConfig, network: DecisionNetwork, saving: float = 0.5) -> None:
        if not isinstance(saving, (int, float)) or isinstance(saving, bool) or not 0 <= saving <= 1:
            raise ConfigError(f"saving must be a share in [0, 1], got {saving!r}")
        self.config, self.network, self.saving = config, network, float(saving)

    def with_saving(self, saving: float) -> "AdaPolicy":
        """The same network, asked for another share of reuse steps."""
        return AdaPolicy(self.config, self.network, saving)

    @property
    def storage(self) -> StorageRule:
        """What reuse steps start from."""
        return rule_named(self.config.storage_name)

    @property
    def cutoffs(self) -> Sequence[int]:
        """The blocks that a reuse step may start from."""
        return self.config.cutoffs

    def decides_at(self, num_steps: int) -> int | None:
        """The first step that is decided on; None if nothing can be reused in so few steps."""
        return first_decided(self.config.rho, num_steps)

    def check(self, transformer: nn.Module) -> None:
        """Raise PolicyError unless `transformer` is the one that the policy was trained for, in any number format."""
        ours, theirs = self.config.model, model_facts(transformer)
        strange = [name for name in ours if ours[name] != theirs.get(name)]
        if strange:
            name = strange[0]
            raise PolicyError(
                f"the policy was trained for another model: its {name} is {ours[name]!r}, "
                f"that of this {theirs['class']} is {theirs.get(name)!r}"
            )
        known, found = self.config.fingerprint, fingerprint_of(transformer)
        if known is not None and found is not None and not same_weights(known, found):
            raise PolicyError(f"the policy was trained for a {theirs['class']} with other weights; train one for these")

    @torch.no_grad()
    def decide(self, moment: Moment) -> list[Decision]:
        """Greedy: the more probable of both kinds on every step, and on reuse steps the most probable cutoff."""
        first = self.decides_at(moment.num_steps)
        assert first is not None, "asked only where decides_at says so"
        wanted = torch.full((len(moment.latent),), self.saving)
        logits, cutoffs = self.network(moment, first, wanted)
        probabilities, chosen = logits.sigmoid().tolist(), cutoffs.argmax(dim=-1).tolist()
        return [
            Decision(self.schedule_of([p >= THRESHOLD for p in keeps], which, moment.num_steps), tuple(keeps))
            for keeps, which in zip(probabilities, chosen, strict=True)
        ]

    def schedule_of(self, is_cache: Sequence[bool], cutoffs: Sequence[int], num_steps: int) -> Schedule:
        """The schedule of decisions, one per remaining step; `cutoffs` are places in `self.cutoffs`."""
        first = num_steps - len(is_cache)
        kinds = [StepKind.FULL] * (first - 1) + [StepKind.CACHE]
        kinds += [StepKind.CACHE if cache else StepKind.REUSE for cache in is_cache]
        return Schedule.with_cutoffs(kinds, [0] * first + [self.cutoffs[place] for place in cutoffs])

    def save(self, file: AnyPath) -> None:
        """Write weights and config as one safetensors file, in one stroke; folders that are missing are made.

        Raises:
            ConfigError: the file cannot be written.
        """
        weights = {name: weight.contiguous() for name, weight in self.network.state_dict().items()}
        told = {"policy": json.dumps(asdict(self.config))}
        written(file, lambda new: save_file(weights, new, metadata=told))

    @classmethod
    def load(cls, file: AnyPath, saving: float = 0.5) -> "AdaPolicy":
        """The inverse of `save`.

        Raises:
            PolicyError: the file is missing or holds no policy.
        """
        file = Path(file)
        try:
            with safe_open(file, framework="pt") as opened:
                told = json.loads(opened.metadata()["policy"])
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
            told["shape"], told["cutoffs"] = Shape(**told["shape"]), tuple(told["cutoffs"])
            if told.get("fingerprint") is not None:
                told["fingerprint"] = tuple(map(float, told["fingerprint"]))
            config = PolicyConfig(**told)
            network = DecisionNetwork(config.shape, config.side)
            network.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PolicyError(f"{file.name} holds no policy: {error}") from None
        return cls(config, network.eval(), saving)


def model_facts(transformer: nn.Module) -> dict[str, Any]:
    """Class and configuration of a transformer, by which a policy knows its own."""
    config: dict[str, Any] = getattr(transformer, "config", {})
    plain = {name: value for name, value in config.items() if isinstance(value, (int, float, str, bool))}
    public = {name: value for name, value in plain.items() if not name.startswith("_") and name != "dtype"}
    return {"class": original_class(type(transformer)).__name__} | dict(sorted(public.items()))


def fingerprint_of(transformer: nn.Module) -> tuple[float, ...] | None:
    """A few weights of matrices from its first to its last, by which a policy knows its model; None if they cannot be read.

    They cannot where they are offloaded to elsewhere, or packed by quantization. Adapters (LoRA) beside them do not matter.
    """
    try:
        weights = some_weights(transformer)
    except Exception:  # packed weights refuse to be read each in its own way
        return None
    return tuple(float(f"{weight:.4g}") for weight in weights) if all(map(math.isfinite, weights)) and weights else None


def some_weights(transformer: nn.Module) -> list[float]:
    """Spread over its matrices; none if one of those chosen is elsewhere, or holds no fractions."""
    matrices = [one for name, one in transformer.named_parameters() if one.ndim > 1 and "lora" not in name]
    chosen = [matrices[place] for place in evenly(len(matrices), WEIGHTS // 4)]
    if not chosen or any(one.is_meta or not one.is_floating_point() for one in chosen):
        return []
    return [one.detach().flatten()[place].item() for one in chosen for place in evenly(one.numel(), 4)]


def evenly(length: int, count: int) -> list[int]:
    """At most `count` different places in `range(length)`, from the first to the last."""
    return sorted({round(part * (length - 1) / (count - 1)) for part in range(count)}) if length else []


def same_weights(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two fingerprints are of one model, perhaps in different number formats."""
    return len(ours) == len(theirs) and math.dist(ours, theirs) <= TOLERANCE * math.hypot(*ours)


def check_rho(rho: float, num_steps: Sequence[int] = ()) -> None:
    """Raise ConfigError unless runs of so many steps have some before the decision, and some after it."""
    if not 0 < rho < 1:
        raise ConfigError(f"rho must be in (0, 1), got {rho!r}")
    for steps in num_steps:
        if first_decided(rho, steps) is None:
            raise ConfigError(
                f"rho must make the first decided step one of [1, {steps - 1}] in a run of {steps}, "
                f"got {rho!r}, which makes it {round(rho * steps)}"
            )


def first_decided(rho: float, num_steps: int) -> int | None:
    """The first step that is decided on; None if nothing can be reused in so few steps."""
    first = round(rho * num_steps)
    return first if num_steps >= MIN_STEPS and 1 <= first < num_steps else None


def new_policy(
    transformer: nn.Module,
    moment: Moment,
    cutoffs: Sequence[int],
    *,
    rho: float = RHO,
    storage: str = "latest",
    width: int = 128,
    training: dict[str, Any] | None = None,
) -> AdaPolicy:
    """An untrained policy for a model, of whose runs `moment` is an example.

    Raises:
        PolicyError: latents that are no pictures, (b, c, h, w), and no videos, (b, c, f, h, w).
        ConfigError: a value outside its range.
    """
    latent, text = moment.latent, moment.text
    if latent.ndim not in (4, 5):
        raise PolicyError(f"a policy sees latents (b, c, h, w) or (b, c, f, h, w), got {tuple(latent.shape)}")
    side = latent.shape[-1]
    patch = 2 ** max(0, math.ceil(math.log2(side / 16)))
    shape = Shape(latent.shape[1], None if text is None else text.shape[-1], len(cutoffs), patch, width)
    config = PolicyConfig(
        model_facts(transformer), tuple(cutoffs), shape, side, rho, storage, training or {}, fingerprint_of(transformer)
    )
    return AdaPolicy(config, DecisionNetwork(shape, side))


def trained(policy: AdaPolicy, **facts: Any) -> AdaPolicy:
    """The policy with facts of its training."""
    config = replace(policy.config, training=policy.config.training | facts)
    return AdaPolicy(config, policy.network, policy.saving)
