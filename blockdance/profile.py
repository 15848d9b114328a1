"""What a planner must know of a model: how far its hidden states move, and what an error in them does to the picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from blockdance.errors import ConfigError
from blockdance.offload import calculation_of
from blockdance.paths import AnyPath, written
from blockdance.schedule import MIN_STEPS
from blockdance.storage import Kept, StorageRule

Products = NDArray[np.float64]
"""(steps, steps): inner products of a block's outputs at any two steps, where their mean square length is 1."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What `measure_profile` found; a small JSON file that serves any number of steps, as it speaks of fractions of the run."""

    model: str
    """Class of the transformer."""
    num_blocks: int
    steps: int
    """Sampling steps it was measured with."""
    prompts: int
    """How many prompts it is the mean of."""
    distance: str
    """The distance's name."""
    products: dict[int, Products]
    """By block, each a candidate for the cutoff."""
    probed: tuple[float, ...]
    """Where, in fractions of the run, `sensitivity` was measured, ascending."""
    sensitivity: dict[int, tuple[float, ...]]
    """By block and place: the change of the picture (root mean square over pixels) for one reuse step, over the relative
    error of what that step started from; root mean square over prompts."""
    outcomes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By storage rule (`key_of`): the expected change of planned runs, and the distance measured, a pair per run and prompt."""

    @property
    def blocks(self) -> list[int]:
        """The candidates for the cutoff, ascending."""
        return sorted(self.products)

    def expected(self, num_steps: int) -> "Expected":
        """The profile at another number of steps.

        Raises:
            ConfigError: fewer than four steps.
        """
        if num_steps < MIN_STEPS:
            raise ConfigError(f"steps must be at least {MIN_STEPS} to reuse anything, got {num_steps}")
        spread = spreading(self.steps, num_steps)
        places = np.linspace(0, 1, num_steps)
        return Expected(
            {block: spread @ products @ spread.T for block, products in self.products.items()},
            {
                block: np.exp(np.interp(places, self.probed, np.log(values))) * np.sqrt(self.steps / num_steps)
                for block, values in self.sensitivity.items()
            },
        )

    def __eq__(self, other: object) -> bool:
        """Whether every number is the same."""
        if not isinstance(other, Profile):
            return NotImplemented
        plain = [one.name for one in fields(self) if one.name != "products"]
        if self.blocks != other.blocks or any(getattr(self, name) != getattr(other, name) for name in plain):
            return False
        return all(np.array_equal(self.products[block], other.products[block]) for block in self.blocks)

    def save(self, file: AnyPath) -> None:
        """Write it as JSON, in one stroke; folders that are missing are made.

        Raises:
            ConfigError: the file cannot be written.
        """
        told = asdict(self) | {"products": {block: triangle(products) for block, products in self.products.items()}}
        written(file, lambda new: new.write_text(json.dumps(told) + "\n"))

    @classmethod
    def load(cls, file: AnyPath) -> "Profile":
        """The inverse of `save`.

        Raises:
            ConfigError: the file is missing or holds no profile.
        """
        file = Path(file)
        try:
            told = json.loads(file.read_text())
            told["products"] = {int(block): square(values, told["steps"]) for block, values in told["products"].items()}
            told["sensitivity"] = {int(block): tuple(values) for block, values in told["sensitivity"].items()}
            told["probed"] = tuple(told["probed"])
            told["outcomes"] = {rule: [(a, b) for a, b in pairs] for rule, pairs in told["outcomes"].items()}
            return cls(**told)
        except OSError as error:
            raise ConfigError(f"no profile can be read from {file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file.name} holds no profile of a model: {error}") from None


@dataclass(frozen=True)
class Expected:
    """What reuse is expected to do to the picture, for one number of steps."""

    products: Mapping[int, Products]
    sensitivity: Mapping[int, NDArray[np.float64]]

    def of(self, block: int) -> "Expected":
        """With one candidate for the cutoff."""
        return Expected({block: self.products[block]}, {block: self.sensitivity[block]})

    def change(self, step: int, block: int, donors: Sequence[int], weights: NDArray[np.float64]) -> float:
        """Change of the picture, root mean square over pixels, if `step` starts from a mixture of what donor steps kept."""
        mixed = np.zeros(len(self.products[block]))
        mixed[step] = -1
        mixed[list(donors)] = weights
        error = np.sqrt(max(0.0, float(mixed @ self.products[block] @ mixed)))
        return float(self.sensitivity[block][step] * error)


def key_of(rule: StorageRule) -> str:
    """Under which a profile keeps a rule's outcomes; where outputs are kept makes no difference to them."""
    return repr(calculation_of(rule))


def mixing_weights(rule: StorageRule, donors: Sequence[int], step: int) -> NDArray[np.float64]:
    """How a rule mixes what donor steps kept, found by giving it unit vectors."""
    units = torch.eye(len(donors), dtype=torch.float64)
    kept = [Kept(donor, [], None, (unit,)) for donor, unit in zip(donors, units, strict=True)]
    return np.asarray(rule.outputs_at(step, kept, ())[0])


def spreading(steps: int, num_steps: int) -> NDArray[np.float64]:
    """(num_steps, steps): states at `num_steps` places of the run from those at `steps`, by cubics through the four nearest."""
    places = np.linspace(0, steps - 1, num_steps)
    first = np.clip(np.floor(places).astype(int) - 1, 0, steps - 4)
    matrix = np.zeros((num_steps, steps))
    for row, (place, left) in enumerate(zip(places, first, strict=True)):
        nodes = np.arange(left, left + 4)
        for node in nodes:
            others = nodes[nodes != node]
            matrix[row, node] = np.prod((place - others) / (node - others))
    return matrix


def triangle(products: Products) -> list[float]:
    """The lower half of a symmetric matrix, row by row."""
    return [float(value) for value in products[np.tril_indices(len(products))]]


def square(values: Sequence[float], steps: int) -> Products:
    """The inverse of `triangle`."""
    products = np.zeros((steps, steps))
    products[np.tril_indices(steps)] = values
    return products + np.tril(products, -1).T
