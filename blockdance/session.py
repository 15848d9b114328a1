"""One session: the transformers in use, and the parts that take part in it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

from blockdance import presence
from blockdance.batch import arguments_for, rows_of, together
from blockdance.company import check_free
from blockdance.denoiser import Denoiser
from blockdance.errors import SessionError, UnsupportedModelError
from blockdance.execution import Execution
from blockdance.part import ModelCall, Part
from blockdance.patch import block_class
from blockdance.swap import swap_for


class Session:
    """Connects transformers with the parts that take part; what tells the steps apart is for a subclass to say."""

    def __init__(self, denoisers: Sequence[Denoiser]) -> None:
        self.denoisers = list(denoisers)
        self._experts = {id(denoiser.transformer): expert for expert, denoiser in enumerate(denoisers)}
        self.scheduler: Any = None
        """Whose steps are followed, if any."""
        self.parts: list[Part] = []
        self.num_steps = 0
        self.steps_done = 0
        self.calls_made = 0
        self.run_number = 0
        self.is_open = False
        self.swaps = ExitStack()
        """Undoes, at the session's end, what was swapped for it."""
        self._with_swapped_blocks: set[int] = set()

    @property
    def transformer(self) -> nn.Module:
        """The first denoiser's."""
        return self.denoisers[0].transformer

    @property
    def num_blocks(self) -> int:
        """L, the depth of the deepest denoiser."""
        return max(denoiser.num_blocks for denoiser in self.denoisers)

    def has(self, transformer: nn.Module) -> bool:
        """Whether it is one of the denoisers'."""
        return id(transformer) in self._experts

    @property
    def is_running(self) -> bool:
        """Whether a run is on."""
        return True

    def is_at(self, arguments: tuple[Any, Any]) -> bool:
        """Whether a call with these arguments can only be of the run that is on."""
        return False

    def begin_run(self, num_steps: int) -> None:
        """A run of that many steps begins here."""
        for denoiser in self.denoisers:
            check_free(denoiser.transformer)
            denoiser.find_hooks()
        self.num_steps, self.steps_done, self.calls_made = num_steps, 0, 0
        self.run_number += 1
        presence.bind(self)
        for part in self.parts:
            part.begin_run(self)

    def resize_run(self, num_steps: int) -> None:
        """The run that is on turns out to have that many steps, or its transformer other blocks.

        Raises:
            ScheduleError: what is planned does not fit that.
        """
        self.num_steps = num_steps
        for part in self.parts:
            part.resize_run(self)
        self.check_fit()

    def check_fit(self) -> None:
        """Raise the ScheduleError that makes the run impossible, if there is one."""
        for part in self.parts:
            if part.unfit is not None:
                raise part.unfit

    def run_model(
        self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """`run(model, *args, **kwargs)`, called from `frame`, or what a part has in its place."""
        call = self.next_call(self._experts[id(model)], args, kwargs, frame)
        if call is None:
            return self._uncompiled(run, model)(model, *args, **kwargs)
        self.calls_made += 1
        self._check_call(call)
        if call.denoiser.prove(partial(run, model, *args, **kwargs)):
            self.resize_run(self.num_steps)
            call.depth = call.denoiser.depth_in(kwargs)
        output = None
        for part in self.parts:
            output = part.begin_call(call) if output is None else output
        if output is None:
            lists: Sequence[Sequence[int]] = ()
            for part in self.parts:
                lists = lists or part.parts_of(call)
            output = self._run_parts(run, model, call, lists) if lists else self._run_blocks(run, model, call)
        for part in self.parts:
            part.end_call(call, output)
        return output

    def next_call(self, expert: int, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> ModelCall | None:
        """The call that comes now, with these arguments; None if it is no call of a run."""
        raise NotImplementedError

    def made_call(
        self, expert: int, place: tuple[int, int, int], args: tuple[Any, ...], kwargs: dict[str, Any], order: int = 0
    ) -> ModelCall:
        """A call at a (step, stage, branch)."""
        denoiser = self.denoisers[expert]
        rows = len(args[0] if args else kwargs[denoiser.latent_name])
        return ModelCall(*place, args, kwargs, rows, denoiser.depth_in(kwargs), denoiser, expert, order)

    def _check_call(self, call: ModelCall) -> None:
        """Before anything runs, raise UnsupportedModelError for a call whose blocks do more than return their streams."""
        for name in call.denoiser.kv_caches:
            if call.denoiser.named(call.args, call.kwargs).get(name) is not None:
                raise UnsupportedModelError(f"blocks that fill a kv cache must all run; call the transformer without {name}")

    def _run_blocks(self, run: Callable[..., Any], model: nn.Module, call: ModelCall) -> Any:
        """With the blocks swapped, from the first call on that needs it; a run which never reuses costs next to nothing."""
        watchers = [part for part in self.parts if part.watches_blocks(call)]
        if not watchers:
            call.blocks_evaluated = call.depth
            return self._uncompiled(run, model)(model, *call.args, **call.kwargs)
        if id(model) not in self._with_swapped_blocks:
            self._with_swapped_blocks.add(id(model))
            for block in call.denoiser.blocks:
                swap_for(self.swaps, block.module, block_class)
        return Execution(call, watchers)(self._uncompiled(run, model), model)

    def _run_parts(self, run: Callable[..., Any], model: nn.Module, call: ModelCall, lists: Sequence[Sequence[int]]) -> Any:
        """One call as several, each of some of its samples."""
        if any(part.needs_whole_batches for part in self.parts):
            raise SessionError("observe sees whole batches; run samples that differ in their schedules one at a time")
        values, num_samples = call.denoiser.named(call.args, call.kwargs), sum(map(len, lists))
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

    def _uncompiled(self, run: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
        """Around the module's own compiled graph, if it has one, once blocks are swapped.

        That graph holds all blocks; traced through swapped ones it would be compiled again. Blocks that are compiled stay so.
        """
        is_compiled = getattr(model, "_compiled_call_impl", None) is not None
        return nn.Module._call_impl if is_compiled and id(model) in self._with_swapped_blocks else run


def is_dense_by_gradient() -> bool:
    """With gradients on, checkpointing may run blocks again in another order: nothing may be stored or reused."""
    return torch.is_grad_enabled()
