"""One call of the transformer while it runs: its blocks report to the parts that watch them."""

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import nn

from blockdance.part import ModelCall, Part
from blockdance.patch import CURRENT


class Execution:
    """Counts the blocks of a call that run, and asks its watchers about those that they watch."""

    def __init__(self, call: ModelCall, watchers: Sequence[Part]) -> None:
        self.call, self._watchers = call, watchers
        self._index_of, self._blocks = call.denoiser.index_of, call.denoiser.blocks
        self._entered = False
        self._skipped = 0
        """The first so many blocks hand on what they are given."""
        self._before: list[tuple[Part, Container[int]]] = []
        self._after: list[tuple[Part, Container[int]]] = []

    def __call__(self, run: Callable[..., Any], model: nn.Module) -> Any:
        """`run(model, *args, **kwargs)` with the arguments of the call."""
        token = CURRENT.set(self)
        try:
            return run(model, *self.call.args, **self.call.kwargs)
        finally:
            CURRENT.reset(token)

    def run_block(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(module, *args, **kwargs)`, or what a watcher has in its place."""
        index = self._index_of.get(id(module))
        if index is None:
            return run(module, *args, **kwargs)
        block = self._blocks[index]
        if not self._entered:
            self._enter(block.inputs(args, kwargs))
        if index < self._skipped:
            return block.passed(args, kwargs)
        for part, blocks in self._before:
            if index in blocks and (outputs := part.before_block(self.call, index, args, kwargs)) is not None:
                return block.returning(outputs)
        returned = run(module, *args, **kwargs)
        self.call.blocks_evaluated += 1
        for part, blocks in self._after:
            if index in blocks:
                part.after_block(self.call, index, block.outputs(returned))
        return returned

    def _enter(self, inputs: Any) -> None:
        """The first block is about to run: only now it is known whether what is stored fits, and so which blocks matter."""
        self._entered = True
        for part in self._watchers:
            part.enter(self.call, inputs)
        self._skipped = max(part.blocks_skipped(self.call) for part in self._watchers)
        self._before = [(part, blocks) for part in self._watchers if (blocks := part.blocks_before(self.call))]
        self._after = [(part, blocks) for part in self._watchers if (blocks := part.blocks_after(self.call))]
