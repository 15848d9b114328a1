"""Accept or refuse a transformer without an adapter: the same input twice, once with reuse, must give the same bits."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from blockdance.adapters import Block, Stack, Streams, blocks_of, parameter_names
from blockdance.candidates import candidate_stacks
from blockdance.errors import UnsupportedModelError
from blockdance.patch import CURRENT, block_class
from blockdance.swap import swap_for
from blockdance.work import Work, num_parameters

__all__ = ["candidate_stacks", "proven_stack"]

OUT_OF_ORDER = "its blocks do not run once each, one after the other, each on the streams that the one before returned"
INEXACT = "with the same input twice, starting the second time from a stored block output did not give the same bits"
IDLE = "starting from another block output gave the same bits, so what its blocks put out does not matter"
MOST = 0.5
"""The blocks must do more than this fraction of what runs in a call, for reuse could not save much otherwise."""


class Handler:
    """Stands in for a session where some modules run."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.index_of = {id(module): index for index, module in enumerate(self.modules)}

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As `Execution.run_block`."""
        raise NotImplementedError

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The modules report here, and to no session around."""
        with ExitStack() as stack:
            for module in self.modules:
                swap_for(stack, module, block_class)
            stack.callback(CURRENT.reset, CURRENT.set(self))
            yield


@dataclass
class Sighting:
    """One call of a module that may be a block."""

    module: nn.Module
    shapes: dict[str, Any]
    """Of what it was given, by the parameters' names."""
    returned: tuple[Any, ...]
    """The shapes of what it returned."""
    went_to: list[str | None] = field(default_factory=list)
    """For each of these, the parameter of the module called next that took the very same tensor."""


class Watch(Handler):
    """Writes down which modules run, and where their outputs go."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__(modules)
        self.sightings: list[Sighting] = []
        self._last: tuple[Any, ...] = ()

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As `Execution.run_block`."""
        given = dict(zip(parameter_names(module), args, strict=False)) | kwargs
        if self.sightings:
            self.sightings[-1].went_to = [_name_of(tensor, given) for tensor in self._last]
        returned = run(module, *args, **kwargs)
        self._last = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        shapes = {name: _shape(value) for name, value in given.items()}
        self.sightings.append(Sighting(module, shapes, tuple(map(_shape, self._last))))
        return returned

    def misfits(self, blocks: list[Block]) -> int | None:
        """In how many places blocks change the shape of a stream. None if they did not run like this."""
        ids = {id(block.module) for block in blocks}
        calls = [call for call in self.sightings if id(call.module) in ids]
        if [id(call.module) for call in calls] != [id(block.module) for block in blocks]:
            return None
        followers = {id(call): after for call, after in zip(self.sightings, self.sightings[1:], strict=False)}
        misfits = 0
        for call, block, after in zip(calls, blocks, blocks[1:], strict=False):
            if len(call.returned) != len(block.streams):
                return None
            went_on = after.streams == block.streams and followers[id(call)].module is after.module
            if went_on and any(name not in (None, stream) for name, stream in zip(call.went_to, block.streams, strict=True)):
                return None
            shapes = zip(call.returned, block.streams, strict=True)
            misfits += sum(shape != call.shapes.get(stream) for shape, stream in shapes)
        return misfits

    def fitting(self, candidates: list[Stack], axes: list[list[Block]]) -> list[int]:
        """Places of the candidates that ran as they say: in their order, but of the same lists what keeps its shapes first."""
        rank = {tuple(stack.returns): place for place, stack in reversed(list(enumerate(candidates)))}
        misfits = {place: self.misfits(blocks) for place, blocks in enumerate(axes)}
        found = [
            (rank[tuple(candidates[place].returns)], count, place) for place, count in misfits.items() if count is not None
        ]
        return [place for *_, place in sorted(found)]


class Probe(Handler):
    """Reuse at every cutoff in turn: each call starts from the block output that the call before has kept."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__(block.module for block in blocks)
        self.blocks = blocks
        self.cutoff = -1
        """The block whose output the next call starts from; -1 for none. The output of the next block is kept."""
        self.start: Streams = ()
        self.kept: Streams = ()
        self.called: list[int] = []

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As `Execution.run_block`."""
        index = self.index_of[id(module)]
        block = self.blocks[index]
        self.called.append(index)
        if index <= self.cutoff:
            return block.returning(self.start if index == self.cutoff else block.inputs(args, kwargs))
        returned = run(module, *args, **kwargs)
        if index == self.cutoff + 1 < len(self.blocks) - 1:
            self.kept = tuple(stream.clone() for stream in block.outputs(returned))
        return returned

    def gives(self, expected: list[Tensor], call: Callable[[], Any], cutoff: int = -1, start: Streams = ()) -> bool:
        """Whether a call that starts behind block `cutoff` from these streams has the expected output, bit for bit."""
        self.cutoff, self.start = cutoff, start
        self.called.clear()
        return same_bits(tensors_in(call()), expected)

    def flaw(self, call: Callable[[], Any], expected: list[Tensor], ends: set[int]) -> str | None:
        """What is wrong with reuse over these blocks, if anything; at cutoffs in `ends` also another start is tried."""
        if not self.gives(expected, call):
            return INEXACT
        for cutoff in range(len(self.blocks) - 1):
            start = self.kept
            other = tuple(stream.flip(-1) for stream in start)
            if cutoff in ends and self.gives(expected, call, cutoff, other):
                return IDLE
            if not self.gives(expected, call, cutoff, start):
                return INEXACT
            if self.called != list(range(len(self.blocks))):
                return OUT_OF_ORDER
        return None


class Share(Handler):
    """Counts the operations inside of blocks."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__(block.module for block in blocks)
        self.inside = 0
        self.work = Work()

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As `Execution.run_block`."""
        before = self.work.flops
        returned = run(module, *args, **kwargs)
        self.inside += self.work.flops - before
        return returned

    def of(self, call: Callable[[], Any]) -> float:
        """The fraction of a call's operations that is in these blocks, 0 to 1."""
        with self.watching(), self.work:
            call()
        return self.inside / max(1, self.work.flops)


def proven_stack(transformer: nn.Module, candidates: list[Stack], call: Callable[[], Any]) -> Stack:
    """The first of the candidates that reuses exactly at every cutoff, from outputs that matter.

    Needs one call of the model, and for each candidate that it leaves about half as many as there are blocks.

    Args:
        transformer: in eval mode.
        candidates: from `candidate_stacks`.
        call: runs the transformer once, always on the same input.

    Raises:
        UnsupportedModelError: none does.
    """
    flaw = OUT_OF_ORDER
    with torch.no_grad():
        axes = [blocks_of(transformer, stack) for stack in candidates]
        watch = Watch({id(block.module): block.module for blocks in axes for block in blocks}.values())
        with watch.watching():
            expected = tensors_in(call())  # raises what is wrong with the call itself
        for place in watch.fitting(candidates, axes):
            found = flaw_of(axes[place], call, expected, _ends(transformer, candidates[place], axes[place]))
            found = found or saves_little(transformer, axes[place], call)
            if found is None:
                return candidates[place]
            flaw = found
    raise UnsupportedModelError(f"{type(transformer).__name__} has no adapter and failed the self-test: {flaw}")


def flaw_of(blocks: list[Block], call: Callable[[], Any], expected: list[Tensor], ends: set[int]) -> str | None:
    """What is wrong with reuse over these blocks, if anything; see `Probe.flaw`."""
    probe = Probe(blocks)
    with probe.watching():
        try:
            return probe.flaw(call, expected, ends)
        except Exception as error:  # whatever a model does when its streams are mixed up, it is not exact
            return f"starting from a stored block output ended in {type(error).__name__}: {error}"


def saves_little(transformer: nn.Module, blocks: list[Block], call: Callable[[], Any]) -> str | None:
    """Why reuse over these blocks, a text encoder inside the model not being among them, is not worth it; None if it is.

    Blocks that hold most parameters are most of the model. In a small one a table may have more, but rarely more to do.
    """
    if num_parameters(block.module for block in blocks) > MOST * num_parameters([transformer]):
        return None
    share = Share(blocks).of(call)
    return None if share > MOST else f"its blocks do {share:.0%} of what runs in a call, so reuse could save little"


def _ends(transformer: nn.Module, stack: Stack, blocks: list[Block]) -> set[int]:
    """The last cutoff in each of the stack's lists."""
    last = {path: len(attrgetter(path)(transformer)) for path in stack.returns}
    if stack.interleaved:
        return set(range(len(blocks) - 1)[-len(last) :])
    return {min(end, len(blocks) - 1) - 1 for end in accumulate(last.values())}


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in a transformer's output: by itself, or in tuples, lists, dictionaries and diffusers' output classes."""
    if isinstance(output, Tensor):
        return [output]
    inner = list(output.values()) if isinstance(output, Mapping) else output
    return [tensor for one in inner for tensor in tensors_in(one)] if isinstance(inner, (list, tuple)) else []


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether there are tensors at all, and all of them the same."""
    return 0 < len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _name_of(tensor: Any, given: dict[str, Any]) -> str | None:
    """The argument that is this very tensor."""
    return next((name for name, value in given.items() if value is tensor and tensor is not None), None)
