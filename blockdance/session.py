"""One session: a transformer in use, and the parts that take part in it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockdance.adapters import Streams, blocks_of, parameter_names, stack_of
from blockdance.batch import arguments_for, rows_of, together
from blockdance.errors import SessionError, UnsupportedModelError
from blockdance.patch import block_class, swapped
from blockdance.schedule import StepKind
from blockdance.selftest import candidate_stacks, proven_stack

KV_CACHE = "kv_cache"
"""How arguments begin through which blocks are handed a cache to fill."""


@dataclass
class ModelCall:
    """One call of the transformer."""

    step: int
    """Position in sampling order, 0 is the noisiest."""
    stage: int
    """0, or the number of the further evaluation within one step of a second-order scheduler."""
    branch: int
    """Ordinal of the call within one evaluation: 0 and 1 for guidance in two calls."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    """Rows of the batch, both halves of a guided one counted."""
    depth: int
    """Blocks the plain model runs in this call: all but those that skip-layer guidance leaves out."""
    kind: StepKind = StepKind.FULL
    blocks_evaluated: float = 0
    """Of a batch that is run in parts, the mean over its samples."""
    samples: tuple[int, ...] | None = None
    """Which samples of the batch it is about, if the batch is run in parts; else all."""
    replayed_seconds: float | None = None
    """Seconds the whole step took when it was recorded, if this call's output was replayed."""


class Part:
    """Something that takes part in a session; every hook may be left out."""

    changes_the_run = False
    """Whether it may keep blocks from running."""
    needs_the_baseline = False
    """Whether it makes sense only where every block runs."""
    needs_whole_batches = False
    """Whether it cannot follow a batch that is run in parts."""

    def begin_run(self, session: "Session") -> None:
        """A new run of `session.num_steps` steps begins."""

    def begin_call(self, call: ModelCall) -> Any:
        """Before the transformer runs. Returns its output to have it not run at all, else None."""

    def parts_of(self, call: ModelCall) -> Sequence[Sequence[int]]:
        """Lists of samples that shall be run by themselves in this call; together all of them. Empty for one call of all."""
        return ()

    def begin_part(self, call: ModelCall) -> None:
        """Before some samples of a call are run by themselves; `call` is about these."""

    def watches_blocks(self, call: ModelCall) -> bool:
        """Whether `before_block` and `after_block` matter in this call, which `begin_call` has seen."""
        return False

    def before_block(self, call: ModelCall, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams | None:
        """Before block `index` is called with these arguments. Returns its outputs to have it not run, else None."""

    def after_block(self, call: ModelCall, index: int, outputs: Streams) -> None:
        """Block `index` ran."""

    def end_call(self, call: ModelCall, output: Any) -> None:
        """The transformer returned `output`."""

    def end_step(self, step: int, calls: list[ModelCall], sample_rows: int) -> None:
        """The scheduler finished `step`; its `calls` in order, and the rows of the latent it worked on. Needs a scheduler."""


class Session:
    """Connects one transformer with the parts that take part; what tells the steps apart is for a subclass to say."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        known = stack_of(transformer)
        self._unproven = [] if known else candidate_stacks(transformer)
        self.stack = known or self._unproven[0]
        self.blocks = blocks_of(transformer, self.stack)
        self.index_of = {id(block.module): index for index, block in enumerate(self.blocks)}
        self._names = parameter_names(transformer)
        self.scheduler: Any = None
        """Whose steps are followed, if any."""
        self.parts: list[Part] = []
        self.num_steps = 0
        self._call: ModelCall | None = None
        self._watchers: list[Part] = []
        self._blocks_swapped = False
        self.swaps = ExitStack()
        """Undoes, at the session's end, what was swapped for it."""

    @property
    def num_blocks(self) -> int:
        """L, the depth of the transformer."""
        return len(self.blocks)

    @property
    def latent_name(self) -> str:
        """Of the transformer's first parameter."""
        return self._names[0]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the transformer by their names."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def next_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
        """The (step, stage, branch) of the call that comes now, with these arguments."""
        raise NotImplementedError

    def begin_run(self, num_steps: int) -> None:
        """A run of that many steps begins."""
        self.num_steps = num_steps
        for part in self.parts:
            part.begin_run(self)

    def run_model(self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(model, *args, **kwargs)`, one call of the transformer, or what a part has in its place."""
        self._check_call(args, kwargs)
        if self._unproven:
            self.stack = proven_stack(self.transformer, self._unproven, partial(run, model, *args, **kwargs))
            self.blocks, self._unproven = blocks_of(self.transformer, self.stack), []
        call = self.next_call(args, kwargs)
        output = None
        for part in self.parts:
            output = part.begin_call(call) if output is None else output
        if output is None:
            lists = next((lists for part in self.parts if (lists := part.parts_of(call))), ())
            output = self._run_parts(run, model, call, lists) if lists else self._run_blocks(run, model, call)
        for part in self.parts:
            part.end_call(call, output)
        return output

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before anything runs, raise UnsupportedModelError for a call whose blocks do more than return their streams."""
        for name, value in self.named(args, kwargs).items():
            if name.startswith(KV_CACHE) and value is not None:
                raise UnsupportedModelError(f"blocks that fill a kv cache must all run; call the transformer without {name}")

    def _run_blocks(self, run: Callable[..., Any], model: nn.Module, call: ModelCall) -> Any:
        with self._blocks_watched(call):
            return self._uncompiled(run)(model, *call.args, **call.kwargs)

    def _run_parts(self, run: Callable[..., Any], model: nn.Module, call: ModelCall, lists: Sequence[Sequence[int]]) -> Any:
        """One call as several, each of some of its samples."""
        if any(part.needs_whole_batches for part in self.parts):
            raise SessionError("observe sees whole batches; run samples that differ in their schedules one at a time")
        values, num_samples = self.named(call.args, call.kwargs), sum(map(len, lists))
        rows = [torch.tensor(rows_of(samples, num_samples, call.rows)) for samples in lists]
        outputs = []
        for samples, chosen in zip(lists, rows, strict=True):
            kwargs = arguments_for(values, chosen, call.rows)
            part = replace(call, args=(), kwargs=kwargs, rows=len(chosen), samples=tuple(samples), blocks_evaluated=0)
            for one in self.parts:
                one.begin_part(part)
            outputs.append(self._run_blocks(run, model, part))
            call.blocks_evaluated += part.blocks_evaluated * len(samples) / num_samples
        return together(outputs, rows)

    @contextmanager
    def _blocks_watched(self, call: ModelCall) -> Iterator[None]:
        """Send the blocks of this call through `run_block` if a part wants it; else all of them run as in the plain model.

        They are swapped at the first call that needs it, so that a run which never reuses costs next to nothing.
        """
        self._watchers = [part for part in self.parts if part.watches_blocks(call)]
        if not self._watchers:
            call.blocks_evaluated = call.depth
            yield
            return
        if not self._blocks_swapped:
            self._blocks_swapped = True
            for block in self.blocks:
                self.swaps.enter_context(swapped(block.module, block_class))
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _uncompiled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Around the module's own compiled graph, if it has one, once blocks are swapped.

        That graph holds all blocks; traced through swapped ones it would be compiled again. Blocks that are compiled stay so.
        """
        is_compiled = getattr(self.transformer, "_compiled_call_impl", None) is not None
        return nn.Module._call_impl if self._blocks_swapped and is_compiled else run

    def next_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        step, stage, branch = self.next_place(args, kwargs)
        latent = args[0] if args else kwargs[self.latent_name]
        depth = self.num_blocks - len(kwargs.get("skip_layers") or ())
        return ModelCall(step, stage, branch, args, kwargs, len(latent), depth)

    def run_block(
        self, index: int, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`run(module, *args, **kwargs)`, or what a part has in its place."""
        call, block = self._call, self.blocks[index]
        if call is None:
            return run(module, *args, **kwargs)
        for part in self._watchers:
            outputs = part.before_block(call, index, args, kwargs)
            if outputs is not None:
                return block.returning(outputs)
        returned = run(module, *args, **kwargs)
        call.blocks_evaluated += 1
        for part in self._watchers:
            part.after_block(call, index, block.outputs(returned))
        return returned


def is_dense_by_gradient() -> bool:
    """With gradients on, checkpointing may run blocks again in another order: nothing may be stored or reused."""
    return torch.is_grad_enabled()


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, also those inside dictionaries such as `added_cond_kwargs`."""
    values = (*args, *kwargs.values())
    leaves = [leaf for value in values for leaf in (value.values() if isinstance(value, dict) else [value])]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def same_tensors(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether these are the same, bit for bit."""
    return len(ours) == len(theirs) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )
