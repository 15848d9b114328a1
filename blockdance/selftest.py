"""Accept or refuse a transformer without an adapter: the same input twice, once with reuse, must give the same bits."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockdance.adapters import IMAGE, IMAGE_TEXT, TEXT_IMAGE, Block, Stack, Streams, blocks_of, parameter_names
from blockdance.errors import UnsupportedModelError
from blockdance.patch import CURRENT, block_class, swapped


class Probe:
    """Stands in for a session: first stores the output of block `cutoff`, then starts from it."""

    def __init__(self, blocks: list[Block], cutoff: int) -> None:
        self.blocks, self.cutoff = blocks, cutoff
        self.index_of = {id(block.module): index for index, block in enumerate(blocks)}
        self.stored: Streams | None = None

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As `Execution.run_block`."""
        index = self.index_of[id(module)]
        block = self.blocks[index]
        if self.stored is not None and index <= self.cutoff:
            return block.returning(self.stored if index == self.cutoff else block.inputs(args, kwargs))
        returned = run(module, *args, **kwargs)
        if index == self.cutoff:
            self.stored = tuple(stream.clone() for stream in block.outputs(returned))
        return returned

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The blocks report here, and to no session around."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(swapped(block.module, block_class))
            stack.callback(CURRENT.reset, CURRENT.set(self))
            yield


def candidate_stacks(transformer: nn.Module) -> list[Stack]:
    """What an unknown transformer's stack may be: its longest list of blocks, with each order of returns its blocks allow.

    Raises:
        UnsupportedModelError: it has no list of two or more equal blocks.
    """
    lists = {path: list(child) for path, child in transformer.named_children() if isinstance(child, nn.ModuleList)}
    lists = {path: blocks for path, blocks in lists.items() if len(blocks) > 1 and len(set(map(type, blocks))) == 1}
    if not lists:
        raise UnsupportedModelError(f"{type(transformer).__name__} has no list of blocks whose outputs could be reused")
    path = max(lists, key=lambda path: len(lists[path]))
    names = parameter_names(lists[path][0])
    orders = [order for order in (IMAGE, IMAGE_TEXT, TEXT_IMAGE) if set(order) <= set(names)] or [tuple(names[:1])]
    return [Stack({path: order}) for order in orders]


def proven_stack(transformer: nn.Module, candidates: list[Stack], call: Callable[[], Any]) -> Stack:
    """The first of the candidates that reuses exactly at every cutoff; needs two calls of the model for each.

    Args:
        transformer: in eval mode.
        candidates: from `candidate_stacks`.
        call: runs the transformer once, always on the same input.

    Raises:
        UnsupportedModelError: none does.
    """
    with torch.no_grad():
        expected = _sample(call())  # raises what is wrong with the call itself
        for stack in candidates:
            blocks = blocks_of(transformer, stack)
            if all(reuses_exactly(blocks, cutoff, call, expected) for cutoff in range(len(blocks) - 1)):
                return stack
    raise UnsupportedModelError(
        f"{type(transformer).__name__} has no adapter and failed the self-test: with the same input twice, "
        "starting the second time from a stored block output did not give the same bits"
    )


def reuses_exactly(blocks: list[Block], cutoff: int, call: Callable[[], Any], expected: Tensor) -> bool:
    """Whether a reuse step at `cutoff` gives the bits of the full step before it, on the same input."""
    probe = Probe(blocks, cutoff)
    with probe.watching():
        try:
            full, reused = _sample(call()), _sample(call())
        except Exception:  # whatever a model does when its streams are mixed up, it is not exact
            return False
    return probe.stored is not None and torch.equal(full, expected) and torch.equal(reused, expected)


def _sample(output: Any) -> Tensor:
    """The tensor in a transformer's output, by itself, or in a tuple or a diffusers output class."""
    sample: Tensor = output if isinstance(output, Tensor) else output[0]
    return sample
