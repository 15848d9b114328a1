"""What cache steps kept, and what each of it is good for."""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import product

from blockdance.adapters import Streams
from blockdance.batch import sample_of
from blockdance.storage import Kept, mapped

Branch = tuple[int, int]
"""Denoiser and branch."""
Place = tuple[int, int]
"""Sample and block; sample 0 is the whole batch as long as its samples are not told apart."""


class KeptOutputs:
    """Block outputs of one run, by branch, sample and block; in each place those of adjacent cache steps, in order.

    An output is good for a later call only if it is of the same branch, was made at the last cache step before it or later, and
    from inputs of the same shapes, dtypes and device by a model with the same adapters.
    """

    def __init__(self, points: int) -> None:
        self.points = points
        self._kept: dict[Branch, dict[Place, list[Kept]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Nothing is good for anything any more."""
        self._kept.clear()

    def drop(self, branch: Branch) -> None:
        """Nothing of this branch is."""
        self._kept.pop(branch, None)

    def put(self, branch: Branch, place: Place, fresh: Kept, last_cache: float) -> None:
        """Keep an output; earlier ones beside it only if none is missing since `last_cache`, the cache step before it."""
        places = self._kept.setdefault(branch, {})
        earlier = [one for one in places.get(place, []) if one.entry == fresh.entry and one.position < fresh.position]
        if not earlier or earlier[-1].position < last_cache:
            earlier = []
        places[place] = [*earlier, fresh][-self.points :]

    def good(self, branch: Branch, place: Place, entry: list[Hashable], last_cache: float) -> list[Kept]:
        """What a call can start from; empty if nothing is good for it."""
        kept = self._kept.get(branch, {}).get(place, [])
        return kept if kept and kept[-1].entry == entry and kept[-1].position >= last_cache else []

    def retain(self, branch: Branch, sample: int, blocks: frozenset[int]) -> None:
        """Of this sample, drop all other blocks' outputs."""
        places = self._kept.get(branch, {})
        for place in [place for place in places if place[0] == sample and place[1] not in blocks]:
            del places[place]

    def split(self, num_samples: int, rows: int) -> None:
        """Give every sample what was kept of the whole batch, in calls of `rows` rows."""
        for places in self._kept.values():
            whole = {block: several for (_, block), several in places.items()}
            places.clear()
            for sample, (block, several) in product(range(num_samples), whole.items()):
                places[sample, block] = [part_of(one, sample, num_samples, rows) for one in several]

    def all(self) -> Iterator[Kept]:
        """Everything that is kept."""
        for places in self._kept.values():
            for several in places.values():
                yield from several


def part_of(kept: Kept, sample: int, num_samples: int, rows: int) -> Kept:
    """What was kept of a whole call of `rows` rows, of one sample."""

    def part(streams: Streams) -> Streams:
        return mapped(streams, lambda stream: sample_of(stream, sample, num_samples, rows).clone())

    outputs, inputs = part(kept.outputs), None if kept.inputs is None else part(kept.inputs)
    (adapters, *streams) = kept.entry
    entry = [adapters, *(((shape[0] // num_samples, *shape[1:]), *more) for shape, *more in streams)]
    return replace(kept, entry=entry, inputs=inputs, outputs=outputs)
