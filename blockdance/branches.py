"""Tell the branches of a run apart: by what the pipeline calls them, by their conditioning, and by where they are called."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from blockdance.arguments import Leaf, leaves_of, same_value
from blockdance.callers import Site

MANY_MISSES = 4
MOST_CONDITIONINGS = 64
PLAIN = (str, int, float, bool, type(None))
MOST = 8
"""Conditionings, and branches, remembered at most; a text that changes with every call makes a new one each time."""
SEVERAL_NAMES = ("conditional", "unconditional", "perturbed")
"""Of branches in calls of their own, in the order in which diffusers' pipelines call them."""


class Conditionings:
    """Gives equal conditionings equal numbers.

    An argument is known by its object as long as nobody writes into it, which costs no look at its values. Only what is made
    anew for every call is compared. On a GPU that waits for it, so there it begins after more misses than there are branches.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._misses = 0
        self._known: dict[int, tuple[Hashable, list[tuple[Leaf, float]]]] = {}
        """By number: the signature, and every leaf with the count of writes into it."""
        self._numbers: dict[Hashable, int] = {}
        self._next = 0

    def number_of(self, arguments: Mapping[str, Any]) -> int:
        """Of a call with these arguments."""
        signature = _signature(arguments)
        number = self._numbers.get(signature)
        if number is not None:
            return number
        leaves = list(leaves_of(arguments))
        others = reversed(self._known) if self._misses >= MANY_MISSES or not any(map(_is_far, leaves)) else ()
        found = next((number for number in others if self._equals(number, leaves)), None)
        self._misses += found is None
        number = self._next if found is None else found
        self._next += found is None
        self._remember(number, signature, leaves)
        return number

    def _equals(self, number: int, leaves: list[Leaf]) -> bool:
        known = self._known[number][1]
        return len(known) == len(leaves) and all(
            path == other and not _was_written(ours, version) and not (ours is theirs and _was_written(theirs, version))
            and same_value(ours, theirs)
            for ((path, ours), version), (other, theirs) in zip(known, leaves, strict=True)
        )  # fmt: skip

    def _remember(self, number: int, signature: Hashable, leaves: list[Leaf]) -> None:
        """Keeps the leaves, so that no other object gets the identity of one."""
        if number in self._known:
            self._numbers.pop(self._known.pop(number)[0], None)
        elif len(self._known) >= self._most:
            oldest = next(iter(self._known))
            self._numbers.pop(self._known.pop(oldest)[0], None)
        self._known[number] = signature, [(leaf, written(leaf[1]) if isinstance(leaf[1], Tensor) else 0) for leaf in leaves]
        self._numbers[signature] = number


def written(tensor: Tensor) -> float:
    """Another number after somebody wrote into a tensor.

    Of those of `torch.inference_mode` nobody counts the writes: on the CPU it is their sum, on a GPU, not waited for, 0.
    """
    if not tensor.is_inference():
        return tensor._version
    return float(tensor.double().sum()) if tensor.device.type == "cpu" else 0


def _is_far(leaf: Leaf) -> bool:
    return isinstance(leaf[1], Tensor) and leaf[1].device.type != "cpu"


def _signature(arguments: Mapping[str, Any]) -> Hashable:
    return tuple([(name, _identity(value)) for name, value in arguments.items()])


def _identity(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return id(value), written(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    if isinstance(value, Mapping):
        return tuple((name, _identity(one)) for name, one in value.items())
    return value if isinstance(value, PLAIN) else id(value)


def _was_written(value: Any, version: float) -> bool:
    return isinstance(value, Tensor) and written(value) != version


class Branches:
    """Numbers the branches of one denoiser in the order in which they first come.

    Args:
        drop: called with a branch that is not remembered any more, or not to be trusted.
        per_evaluation: whether `end_evaluation` will be called; then there are as many branches as an evaluation has calls.
    """

    def __init__(self, drop: Callable[[int], None], per_evaluation: bool = False) -> None:
        self._drop = drop
        self._per_evaluation = per_evaluation
        self._conditionings = Conditionings(MOST_CONDITIONINGS if per_evaluation else MOST)
        self._branches: dict[Hashable, int] = {}
        self._calls: dict[Hashable, int] = {}
        """Calls that look the same, in this evaluation."""
        self._seen: set[Hashable] = set()
        """Branches that came in this evaluation."""
        self.most_alike = 0
        """How many calls of one look there are in this evaluation, at most."""
        self._usual: dict[Hashable, int] = {}
        """How many there are in an evaluation."""
        self._next = 0

    def looks_like(self, name: str | None, arguments: Mapping[str, Any], site: Site, hooks: Hashable) -> Hashable:
        """What tells a call from others: its `cache_context`, conditioning and place, and the hooks that are on the model."""
        return name, self._conditionings.number_of(arguments), site, hooks

    def branch_of(self, look: Hashable) -> int:
        """The branch of a call; calls of one look are as many branches as there are of them in one evaluation."""
        ordinal = self._calls.get(look, 0)
        self._calls[look] = ordinal + 1
        self.most_alike = max(self.most_alike, ordinal + 1)
        return self.number_of((look, ordinal))

    def number_of(self, key: Hashable) -> int:
        """The number of a branch."""
        branch = self._branches.get(key)
        self._seen.add(key)
        if branch is None:
            if len(self._branches) >= MOST and not self._per_evaluation:
                self._drop(self._branches.pop(next(iter(self._branches))))
            branch = self._branches[key] = self._next
            self._next += 1
        return branch

    def end_evaluation(self) -> None:
        """Drops branches that cannot be told apart, as more calls had their look than usual; and old ones, if they are many."""
        for look, count in self._calls.items():
            if count > self._usual.setdefault(look, count):
                self._usual[look] = count
                for ordinal in range(count):
                    self._drop(self.number_of((look, ordinal)))
        if len(self._branches) > MOST:
            for key in self._branches.keys() - self._seen:
                self._drop(self._branches.pop(key))
        self._calls.clear()
        self._seen.clear()
        self.most_alike = 0
