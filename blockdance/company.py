"""What else may decide which blocks of a transformer run: other caches, and BlockDance itself. With them it is refused."""

from typing import Any

from torch import nn

from blockdance.errors import SessionError
from blockdance.patch import applied_to

FOREIGN_MARKS = {"_is_cached": "cache-dit or ParaAttention", "enable_teacache": "TeaCache"}
"""Attributes that caches of other packages leave on a transformer or its class."""
FOREIGN_PACKAGES = ("cache_dit", "para_attn", "SmoothCache", "teacache")
"""Whose functions in the place of a module's `forward` mean that a cache is on."""


def check_free(transformer: nn.Module) -> None:
    """Raise SessionError if something else decides which of the transformer's blocks run."""
    if applied_to(transformer):
        raise SessionError("this transformer is accelerated already by apply_block_dance or enable_cache; remove that first")
    check_no_cache(transformer)


def check_no_cache(transformer: nn.Module) -> None:
    """Raise SessionError if another cache is on the transformer."""
    if getattr(transformer, "_cache_config", None) is not None:
        raise SessionError(f"{type(transformer).__name__} has another cache enabled; call its disable_cache first")
    found = cache_on(transformer)
    if found:
        raise SessionError(f"{type(transformer).__name__} has another cache on ({found}); take it off first")


def cache_on(transformer: nn.Module) -> str | None:
    """The name of a cache that is on the transformer or on a module inside it, however it got there; None if there is none."""
    for mark, package in FOREIGN_MARKS.items():
        if getattr(transformer, mark, False):
            return package
    for module in transformer.modules():
        hooks: dict[str, Any] = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
        cache = next((name for name, hook in hooks.items() if is_cache(hook)), None)
        foreign = getattr(vars(module).get("forward"), "__module__", None) or ""
        if cache or foreign.startswith(FOREIGN_PACKAGES):
            return cache or foreign.split(".")[0]
    return None


def is_cache(hook: Any) -> bool:
    """Whether a hook of diffusers skips work that it has done before."""
    return any("cache" in place.__module__ or "broadcast" in place.__module__ for place in type(hook).__mro__)
