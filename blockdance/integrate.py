"""Teach diffusers' own `enable_cache` about BlockDance, also on models that have no caches of their own."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers

from blockdance.adapters import STACKS
from blockdance.apply import BlockDanceConfig, apply_block_dance
from blockdance.errors import SessionError, UnsupportedModelError
from blockdance.patch import applied_to

logger = logging.getLogger(__name__)


class NoCaches:
    """What diffusers' `CacheMixin` offers, for classes without it."""

    @property
    def is_cache_enabled(self) -> bool:
        """Nothing is."""
        return False

    def enable_cache(self, config: Any) -> None:
        """Refused: there is only BlockDance."""
        raise UnsupportedModelError(
            f"{type(self).__name__} has none of diffusers' own caches; give a BlockDanceConfig, got {type(config).__name__}"
        )

    def disable_cache(self) -> None:
        """Nothing to do."""
        logger.warning("No cache is enabled, so there is nothing to disable.")

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Nobody listens."""
        yield


def members_with_blockdance(base: Any) -> dict[str, Any]:
    """The members of `CacheMixin`, or of its stand-in, as they are when BlockDance is one of the caches."""

    def enable_cache(self: Any, config: Any) -> None:
        if self.is_cache_enabled:
            raise SessionError("Caching has already been enabled on this model; call disable_cache first")
        if isinstance(config, BlockDanceConfig):
            apply_block_dance(self, config)
        else:
            base["enable_cache"](self, config)

    def disable_cache(self: Any) -> None:
        applied = applied_to(self)
        if applied:
            applied.remove()
        else:
            base["disable_cache"](self)

    def is_cache_enabled(self: Any) -> bool:
        return applied_to(self) is not None or bool(base["is_cache_enabled"].fget(self))

    return {
        "enable_cache": enable_cache,
        "disable_cache": disable_cache,
        "is_cache_enabled": property(is_cache_enabled),
        "cache_context": base["cache_context"],
    }


def integrate() -> Callable[[], None]:
    """Make `transformer.enable_cache(BlockDanceConfig(...))`, `disable_cache()`, `is_cache_enabled` and `cache_context` work.

    They then do on every diffusers model with `CacheMixin`, and on those with an adapter here that lack it (DiT, PixArt, SD3
    and others). diffusers' own configs keep working as before. It acts on the classes, once per process.

    Returns:
        A function that undoes it.
    """
    mixin: Any = diffusers.CacheMixin
    known = [getattr(diffusers, name) for name in STACKS if hasattr(diffusers, name)]
    lacking = [cls for cls in known if not issubclass(cls, mixin) and not hasattr(cls, "enable_cache")]
    before = {name: vars(mixin)[name] for name in members_with_blockdance(vars(NoCaches))}
    integrated = before["enable_cache"].__module__ == __name__
    if not integrated:
        _put(mixin, members_with_blockdance(before))
    for cls in lacking:
        _put(cls, members_with_blockdance(vars(NoCaches)))

    def undo() -> None:
        _put(mixin, before)
        for cls in lacking:
            for name in before:
                delattr(cls, name)

    return undo


def _put(cls: type, members: dict[str, Any]) -> None:
    for name, member in members.items():
        setattr(cls, name, member)
