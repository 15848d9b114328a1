"""The transformer's whole forward in compiled graphs: one for calls in which every block runs, one for the tail alone.

A graph cannot ask a session what each block shall do, so that is decided before it: every kind of call has its own twin of the
transformer. A twin shares all weights and submodules with the model; its blocks are shallow copies that run, hand their inputs
on, or return what a reuse step starts from. The model itself is never changed, so nothing is to be restored and threads
that call it plainly see nothing.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from blockdance.adapters import Block, Streams
from blockdance.errors import SessionError, UnsupportedModelError

OFFLOADING = frozenset({"forward", "_old_forward", "_hf_hook"})
"""Attributes that accelerate's hooks put on a module, for every picture anew."""
WITH_CUDA_GRAPHS = frozenset({"reduce-overhead", "max-autotune"})
"""Modes of torch.compile whose outputs live in memory that the next call overwrites."""


@dataclass(frozen=True)
class Kind:
    """What the blocks do in a call; each kind is compiled by itself."""

    kept: frozenset[int] = frozenset()
    """Blocks whose outputs are returned beside the transformer's."""
    cutoff: int | None = None
    """The last block that is skipped, or None if all run."""


@dataclass
class Board:
    """Where a twin's blocks meet the function around them; written and read within one call."""

    starts: Streams | None = None
    """What block `cutoff` returns; None once it has."""
    kept: dict[int, Streams] = field(default_factory=dict)


class CompiledForward:
    """A transformer's forward, compiled once for every kind of call. Calls of several threads wait for each other.

    Args:
        transformer: the model; only a weak reference is held.
        blocks: its blocks, in the order they run.
        options: of `torch.compile`, such as `mode="reduce-overhead"`, `fullgraph=True` or `backend="eager"`.

    Raises:
        UnsupportedModelError: a hook has replaced the forward of a submodule, so the model is no single graph.
    """

    def __init__(self, transformer: nn.Module, blocks: list[Block], **options: Any) -> None:
        check_graphable(transformer)
        self.blocks, self.options = blocks, options
        self._transformer = weakref.ref(transformer)
        self._hook: Callable[[], Any] = lambda: None
        self._twins: dict[Kind, Twin] = {}
        self._lock = threading.Lock()

    def all_blocks(
        self, kept: Collection[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[int, Streams]]:
        """The transformer's output, and the outputs of those of the `kept` blocks that it called, all of them fresh tensors."""
        output, streams, _ = self._run(Kind(kept=frozenset(kept)), None, args, kwargs)
        return output, streams

    def tail(self, cutoff: int, starts: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The transformer's output if blocks 0 to `cutoff` are skipped and the last of them returns `starts`.

        Raises:
            SessionError: the transformer did not call block `cutoff`, as with skip-layer guidance.
        """
        output, _, started = self._run(Kind(cutoff=cutoff), starts, args, kwargs)
        if not started:
            raise SessionError(f"the transformer left out block {cutoff}, from which a reuse step was to start")
        return output

    def _run(self, kind: Kind, starts: Streams | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Whole-model offloading moves the weights around the graph, not within."""
        assert not torch.is_grad_enabled(), "with gradients the caller runs the model as it is"
        transformer = self._transformer()
        assert transformer is not None, "the caller holds the model it calls"
        hook = self._offloading(transformer)
        if hook is not None:
            args, kwargs = hook.pre_forward(transformer, *args, **kwargs)
        with self._lock:
            twin = self._twin(transformer, kind)
            if self.options.get("mode") in WITH_CUDA_GRAPHS:
                torch.compiler.cudagraph_mark_step_begin()
            output, *more = tree_map_only(Tensor, torch.clone, twin.run(starts, args, kwargs))
        if hook is not None:
            output = hook.post_forward(transformer, output)
        return output, *more

    def _offloading(self, transformer: nn.Module) -> Any:
        """The hook that moves the whole model, if there is one; a new one may have come with others, further down."""
        hook = vars(transformer).get("_hf_hook")
        if hook is not None and hook is not self._hook():
            check_graphable(transformer)
            self._hook = weakref.ref(hook)
        return hook

    def _twin(self, transformer: nn.Module, kind: Kind) -> "Twin":
        """The kind's twin, made anew if what it copied of the model has changed since."""
        twin = self._twins.get(kind)
        if twin is None or twin.copied != state_of(transformer, self.blocks):
            check_graphable(transformer)
            twin = self._twins[kind] = Twin(transformer, self.blocks, kind, self.options)
        return twin


class Twin:
    """A transformer that shares everything with the model but does, when called, what `kind` says; compiled."""

    def __init__(self, transformer: nn.Module, blocks: list[Block], kind: Kind, options: dict[str, Any]) -> None:
        self.copied = state_of(transformer, blocks)
        board = Board()
        stand_ins = {block.module: stand_in(block, index, kind, board) for index, block in enumerate(blocks)}
        model = with_stand_ins(transformer, stand_ins)
        for name in OFFLOADING & vars(model).keys():
            delattr(model, name)

        def run(starts: Streams | None, args: Any, kwargs: Any) -> tuple[Any, dict[int, Streams], bool]:
            board.starts = None if starts is None else _copied(starts)
            board.kept = {}
            output = model(*args, **kwargs)
            kept, started = board.kept, board.starts is None
            board.starts, board.kept = None, {}
            return output, kept, started

        # Without isolation, twins would count together against dynamo's limit of graphs for one function.
        self.run = torch.compile(run, **{"isolate_recompiles": True} | options)


def stand_in(block: Block, index: int, kind: Kind, board: Board) -> nn.Module:
    """A copy of the block, of its class before any swap, that does what `kind` says."""
    copied = copy.copy(block.module)

    def keep(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        returned = nn.Module.__call__(self, *args, **kwargs)
        board.kept[index] = _copied(block.outputs(returned))
        return returned

    def hand_on(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return block.returning(block.inputs(args, kwargs))

    def start(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        starts, board.starts = board.starts, None
        assert starts is not None, "a tail is given what it starts from"
        return block.returning(starts)

    if index in kind.kept:
        return _calling(copied, keep)
    if kind.cutoff is None or index > kind.cutoff:
        return copied
    return _calling(copied, start if index == kind.cutoff else hand_on)


def with_stand_ins(module: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module, or a copy of it if there is anything below that a stand-in takes the place of."""
    if module in stand_ins:
        return stand_ins[module]
    children = {name: child and with_stand_ins(child, stand_ins) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    copied = copy.copy(module)
    copied._modules = children
    return copied


def state_of(transformer: nn.Module, blocks: list[Block]) -> list[int]:
    """What a twin has copied of the model, by identity; whatever lies deeper it shares."""
    lists = [child for child in transformer._modules.values() if isinstance(child, nn.ModuleList)]
    values = [value for name, value in vars(transformer).items() if name not in OFFLOADING]
    values += [child for module in (transformer, *lists) for child in module._modules.values()]
    return [*map(id, values), *(id(value) for block in blocks for value in vars(block.module).values())]


def check_graphable(transformer: nn.Module) -> None:
    """Raise UnsupportedModelError if hooks do more than to wrap the transformer as accelerate's whole-model offloading does."""
    for name, module in replaced_forwards(transformer):
        if module is not transformer or "_hf_hook" not in vars(module):
            raise UnsupportedModelError(
                f"a hook has replaced the forward of {name or 'the transformer'} ({type(module).__name__}), which one graph of "
                "the whole transformer cannot hold; use enable_model_cpu_offload or no offloading, or compile the blocks alone"
            )


def replaced_forwards(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose own `forward` is another function than their class's; hooks that were removed leave the class's behind."""
    for name, module in transformer.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            yield name, module


_compiled: weakref.WeakKeyDictionary[nn.Module, list[CompiledForward]] = weakref.WeakKeyDictionary()
_compiled_lock = threading.Lock()


def compiled_forward(transformer: nn.Module, blocks: list[Block], **options: Any) -> CompiledForward:
    """The transformer's `CompiledForward` with these options; a later session gets the same one, and compiles nothing.

    Raises:
        UnsupportedModelError: as `CompiledForward`.
    """
    check_graphable(transformer)
    with _compiled_lock:
        known = _compiled.setdefault(transformer, [])
        for one in known:
            if one.blocks == blocks and one.options == options:
                return one
        known.append(CompiledForward(transformer, blocks, **options))
        return known[-1]


def _calling(module: nn.Module, call: Any) -> nn.Module:
    """The module with another `__call__`; it stays an instance of its class, whose attributes transformers read."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__call__": call})
    return module


def _copied(streams: Streams) -> Streams:
    """Blocks may write into what they are given."""
    return tuple(stream.clone() for stream in streams)
