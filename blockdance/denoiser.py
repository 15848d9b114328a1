"""The transformers of a pipeline: where their blocks are."""

import re
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from blockdance.adapters import STACKS, blocks_of, parameter_names, stack_of, transformer_of
from blockdance.selftest import candidate_stacks, proven_stack

FURTHER = re.compile(r"^(unconditional_)?transformer(_\d+)?$")
"""Names by which pipelines hold further denoisers: the low-noise expert of Wan 2.2, the unconditional one of others."""

KV_CACHE = "kv_cache"
HOOKS = "_diffusers_hook"
"""The attribute by which diffusers keeps a module's hooks."""
CHANGES_EVERY_STEP = re.compile(r"timestep|sigma|latent|controlnet|^t$|^r$|^x$|(?<!encoder_)hidden_states$")
"""Names of arguments that say where a run is, and not what it is about."""


def is_conditioning(name: str) -> bool:
    """Whether an argument of that name tells one branch from another."""
    return not CHANGES_EVERY_STEP.search(name)


class Denoiser:
    """One transformer in use, and what is known of it."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        known = stack_of(transformer)
        self._unproven = [] if known else candidate_stacks(transformer)
        self.stack = known or self._unproven[0]
        self._names = parameter_names(transformer)
        self._conditioning = {name for name in self._names[1:] if is_conditioning(name)}
        self.kv_caches = [name for name in self._names if name.startswith(KV_CACHE)]
        """Arguments through which blocks are handed a cache to fill."""
        self._find_blocks()

    def _find_blocks(self) -> None:
        self.blocks = blocks_of(self.transformer, self.stack)
        self.index_of = {id(block.module): index for index, block in enumerate(self.blocks)}
        self.find_hooks()

    @property
    def num_blocks(self) -> int:
        """L, the depth."""
        return len(self.blocks)

    @property
    def latent_name(self) -> str:
        """Of the transformer's first parameter."""
        return self._names[0]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the transformer by their names."""
        return dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs

    def conditioning(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by which its branch is known."""
        told = self.named(args, kwargs)
        return {name: value for name, value in told.items() if name in self._conditioning or self._is_new(name)}

    def _is_new(self, name: str) -> bool:
        return name not in self._names and is_conditioning(name)

    def find_hooks(self) -> None:
        """Look for modules that diffusers' hooks were ever put on."""
        self._hooked = [(name, module) for name, module in self.transformer.named_modules() if HOOKS in vars(module)]
        self._unhooked = [vars(block.module) for block in self.blocks if HOOKS not in vars(block.module)]

    def hook_mark(self) -> Hashable:
        """Which hooks are on which modules now; guiders that skip layers put them on for a part of the calls."""
        if any(HOOKS in attributes for attributes in self._unhooked):
            self.find_hooks()
        hooks = [(name, tuple(vars(module)[HOOKS].hooks)) for name, module in self._hooked]
        return tuple([(name, several) for name, several in hooks if several])

    def prove(self, call: Callable[[], Any]) -> bool:
        """Before the first call of a class without an adapter: find blocks that reuse exactly.

        Returns:
            Whether it looked for them.

        Raises:
            UnsupportedModelError: there are none.
        """
        if not self._unproven:
            return False
        self.stack = proven_stack(self.transformer, self._unproven, call)
        self._unproven = []
        self._find_blocks()
        return True

    def depth_in(self, kwargs: dict[str, Any]) -> int:
        """Blocks the plain model runs in a call: all but those that skip-layer guidance leaves out."""
        return self.num_blocks - len(kwargs.get("skip_layers") or ())


def denoisers_of(pipe: Any) -> list[Denoiser]:
    """Of a pipeline, the one called `transformer` first; one, or several that take turns or have a branch each.

    Raises:
        UnsupportedModelError: it has none that can be accelerated.
    """
    first = first_denoiser(pipe)
    found = {id(model): model for model in (first, *_further(pipe)) if model is first or _is_known(model)}
    return [Denoiser(model) for model in found.values()]


def first_denoiser(pipe: Any) -> nn.Module:
    """The pipeline's `transformer`; where it has none, the first further one.

    Raises:
        UnsupportedModelError: it has none that can be accelerated.
    """
    further = _further(pipe)
    return further[0] if further and getattr(pipe, "transformer", None) is None else transformer_of(pipe)


def _further(pipe: Any) -> list[nn.Module]:
    names = {name for name in (*vars(type(pipe)), *vars(pipe)) if FURTHER.match(name)} - {"transformer"}
    return [model for name in sorted(names) if isinstance(model := getattr(pipe, name, None), nn.Module)]


def _is_known(model: nn.Module) -> bool:
    return any(base.__name__ in STACKS for base in type(model).__mro__)
