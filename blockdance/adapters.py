"""Where the blocks of a transformer are: one line per diffusers class, matched by class name."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from blockdance.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stack:
    """How to find a transformer's blocks, each taking and returning one hidden state (batch, tokens, width)."""

    path: str
    """Attribute that holds the ModuleList of blocks."""
    conditional_first: bool = False
    """Order of a batch with both guidance branches: DiT puts the conditional half first, PixArt last."""


STACKS = {
    "PixArtTransformer2DModel": Stack("transformer_blocks"),
    "DiTTransformer2DModel": Stack("transformer_blocks", conditional_first=True),
}


def transformer_of(pipe: Any) -> nn.Module:
    """The pipeline's transformer.

    Raises:
        UnsupportedModelError: a U-Net pipeline, or no transformer at all.
    """
    transformer = getattr(pipe, "transformer", None)
    if isinstance(transformer, nn.Module):
        return transformer
    if getattr(pipe, "unet", None) is not None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has a U-Net; BlockDance reuses transformer blocks, DeepCache is made for U-Nets"
        )
    raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer; pass a diffusers pipeline that has one")


def stack_of(transformer: nn.Module) -> Stack:
    """The adapter of a transformer, found by class name over its bases.

    Raises:
        UnsupportedModelError: no adapter.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in STACKS:
            return STACKS[base.__name__]
    supported = ", ".join(STACKS)
    raise UnsupportedModelError(f"{type(transformer).__name__} is not supported; supported are {supported}")


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in the order they run.

    Raises:
        UnsupportedModelError: no adapter, fewer than two blocks, or one block used twice.
    """
    blocks = list(getattr(transformer, stack_of(transformer).path))
    if len(blocks) < 2:
        raise UnsupportedModelError(f"reuse needs at least 2 blocks, {type(transformer).__name__} has {len(blocks)}")
    if len({id(block) for block in blocks}) < len(blocks):
        raise UnsupportedModelError(f"{type(transformer).__name__} runs one block twice; its outputs cannot be told apart")
    return blocks


def guidance_rows(
    transformer: nn.Module, branch: int, kwargs: dict[str, Any], model_rows: int, sample_rows: int
) -> dict[str, slice]:
    """Which rows of one transformer call belong to which guidance branch.

    Guidance in two calls is recognised by `branch` (conditional first, as diffusers' two-call pipelines do); guidance in
    one batch by the call having twice the rows of the latent (PixArt), or null labels in one half (DiT, whose latent
    is doubled too).
    """
    if branch:
        return {"unconditional": slice(0, model_rows)}
    if model_rows != 2 * sample_rows and not _half_null_labels(transformer, kwargs):
        return {"conditional": slice(0, model_rows)}
    halves = slice(0, model_rows // 2), slice(model_rows // 2, model_rows)
    conditional_first = stack_of(transformer).conditional_first
    names = ("conditional", "unconditional") if conditional_first else ("unconditional", "conditional")
    return dict(zip(names, halves, strict=True))


def _half_null_labels(transformer: Any, kwargs: dict[str, Any]) -> bool:
    labels = kwargs.get("class_labels")
    if labels is None or len(labels) % 2:
        return False
    null = labels == transformer.config.num_embeds_ada_norm
    return bool(null[len(labels) // 2 :].all()) and not bool(null[: len(labels) // 2].any())
