"""What the output of a model depends on besides its inputs: its weights, told cheaply, and the adapters on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockdance.arguments import version_of

SAMPLES = 8
"""Numbers looked at of every weight."""
PLAIN = (bool, int, float, str, list, tuple, type(None))


@dataclass(frozen=True)
class WeightState:
    """A weight, as far as it is looked at."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    version: tuple[int, int] | None
    """The object and how often it was written into; None where it is offloaded, and after it was pickled."""
    samples: Tensor | None
    """Some of its numbers; None if they cannot be read, as where it is offloaded or packed."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"version": None}

    def same(self, other: "WeightState") -> bool:
        """Whether it can be the same weight; waits for its device."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        ours, theirs = self.version, other.version
        if ours and theirs and ours[0] == theirs[0] and ours[1] != theirs[1]:
            return False
        if self.samples is None or other.samples is None:
            return ours is None or theirs is None or ours == theirs
        return torch.equal(self.samples.cpu(), other.samples.cpu())


@dataclass(frozen=True)
class ModelState:
    """A model's weights and adapters at one moment."""

    weights: dict[str, WeightState]
    settings: dict[str, Any]
    """Of adapters and attention processors: what is active, and how strongly."""

    def difference(self, other: "ModelState") -> str | None:
        """What is not the same, in a word or two; None if nothing is."""
        if self.settings != other.settings:
            return "adapters"
        same = self.weights.keys() == other.weights.keys() and all(
            mine.same(other.weights[name]) for name, mine in self.weights.items()
        )
        return None if same else "weights"


def state_of(model: nn.Module) -> ModelState:
    """Looks at a few numbers of every weight; copies nothing large."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return ModelState({name: weight_state(weight) for name, weight in named}, dict(settings_of(model)))


def weight_state(weight: Tensor) -> WeightState:
    version = None if weight.is_meta else (id(weight), version_of(weight))
    return WeightState(tuple(weight.shape), weight.dtype, version, samples_of(weight))


def samples_of(weight: Tensor) -> Tensor | None:
    """Numbers from its first to its last; None if they cannot be read."""
    if weight.is_meta or type(weight.data) is not Tensor or not weight.numel():
        return None
    stride = max(1, weight.numel() // SAMPLES)
    return weight.detach().reshape(-1)[::stride][:SAMPLES].clone()


def settings_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What PEFT's layers and attention processors are set to, by module."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            yield name, adapter_setting(module)
        processor = getattr(module, "processor", None)
        if processor is not None:
            plain = {key: value for key, value in vars(processor).items() if isinstance(value, PLAIN) and key[0] != "_"}
            yield f"{name}.processor", (type(processor).__name__, repr(plain))


def adapter_setting(layer: Any) -> tuple[Any, ...]:
    """Which adapters of a layer of PEFT's act, and how strongly."""
    active = tuple(layer.active_adapters)
    scaling = tuple(sorted((name, float(value)) for name, value in layer.scaling.items()))
    return active, scaling, tuple(getattr(layer, "merged_adapters", ())), bool(getattr(layer, "disable_adapters", False))


class AdapterWatch:
    """Tells whether a model's adapters are what they were, without a look at all its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: tuple[str, ...] = ()
        self._layers: list[Any] = []

    def mark(self) -> tuple[Any, ...]:
        """The same as long as nothing changes; empty for a model without adapters."""
        known = tuple(self._model.__dict__.get("peft_config") or ())
        if known != self._known:
            self._known = known
            self._layers = [one for one in self._model.modules() if hasattr(one, "active_adapters") and hasattr(one, "scaling")]
        return tuple(adapter_setting(layer) for layer in self._layers) if known else ()
