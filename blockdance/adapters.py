"""Where the blocks of a transformer are: one line per diffusers class, matched by class name."""

import inspect
from dataclasses import dataclass
from itertools import chain
from typing import Any

from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from blockdance.errors import UnsupportedModelError

Streams = tuple[Tensor, ...]
"""What flows from block to block: the image's hidden state, and in some models the text's beside it."""


IMAGE: tuple[str, ...] = ("hidden_states",)
IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")


@dataclass(frozen=True)
class Stack:
    """Where a transformer's blocks are, and what they return."""

    returns: dict[str, tuple[str, ...]]
    """For each ModuleList of blocks (by attribute path, in the order they run) the streams that a block returns, each named as
    the parameter of its `forward` that takes it in. Several lists are one depth axis."""
    interleaved: bool = False
    """Whether the lists take turns, one block each."""
    conditional_first: bool = False
    """Order of a batch with both guidance branches: DiT puts the conditional half first, PixArt last."""


STACKS = {
    "AllegroTransformer3DModel": Stack({"transformer_blocks": IMAGE}),
    "AuraFlowTransformer2DModel": Stack({"joint_transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "ChromaTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "CogVideoXTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "CogView3PlusTransformer2DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "CogView4Transformer2DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "DiTTransformer2DModel": Stack({"transformer_blocks": IMAGE}, conditional_first=True),
    "Flux2Transformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "FluxTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "HunyuanVideoTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT, "single_transformer_blocks": IMAGE_TEXT}),
    "LTXVideoTransformer3DModel": Stack({"transformer_blocks": IMAGE}),
    "LatteTransformer3DModel": Stack({"transformer_blocks": IMAGE, "temporal_transformer_blocks": IMAGE}, interleaved=True),
    "Lumina2Transformer2DModel": Stack({"layers": IMAGE}),
    "MochiTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "PRXTransformer2DModel": Stack({"blocks": IMAGE}),
    "PixArtTransformer2DModel": Stack({"transformer_blocks": IMAGE}),
    "QwenImageTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE}),
    "SD3Transformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE}),
    "STDiT": Stack({"blocks": ("x",)}, conditional_first=True),
    "STDiT3": Stack({"spatial_blocks": ("x",), "temporal_blocks": ("x",)}, interleaved=True, conditional_first=True),
    "SanaTransformer2DModel": Stack({"transformer_blocks": IMAGE}),
    "WanTransformer3DModel": Stack({"blocks": IMAGE}),
}

FILLS_CACHES = "its blocks fill kv caches, so all of them must run"
REFUSED = {
    "AnyFlowFARTransformer3DModel": FILLS_CACHES,
    "GlmImageTransformer2DModel": FILLS_CACHES,
    "HunyuanDiT2DModel": "its deep blocks read what shallow ones put out, over long skip connections",
    "QwenImage21Transformer2DModel": FILLS_CACHES,
    "SanaWMLTX2RefinerTransformer3DModel": FILLS_CACHES,
    "WanAnimate2Transformer3DModel": FILLS_CACHES,
}
"""Classes that reuse would break, and why."""


@dataclass(frozen=True)
class Block:
    """One block on the depth axis, and how to find its streams."""

    module: nn.Module
    streams: tuple[str, ...]
    """What it returns, in this order, by the names of its `forward`'s parameters."""
    places: tuple[int, ...]
    """Where each of them stands among the positional arguments."""

    @property
    def image(self) -> int:
        """Which of the returned streams is the image's."""
        return next(k for k, name in enumerate(self.streams) if not name.startswith("encoder"))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among a call's arguments, in the order in which they are returned."""
        return tuple(
            args[place] if place < len(args) else kwargs[name] for place, name in zip(self.places, self.streams, strict=True)
        )

    def passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would return if it did nothing."""
        if len(self.streams) > 1:
            return self.inputs(args, kwargs)
        return args[self.places[0]] if self.places[0] < len(args) else kwargs[self.streams[0]]

    def outputs(self, returned: Any) -> Streams:
        """The streams of what the block returned."""
        return returned if len(self.streams) > 1 else (returned,)

    def returning(self, streams: Streams) -> Any:
        """What the block would return for these streams."""
        return streams if len(self.streams) > 1 else streams[0]


def parameter_names(module: nn.Module) -> list[str]:
    """The parameters of its class's `forward`; an instance may carry a wrapped one."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def located(module: nn.Module, streams: tuple[str, ...]) -> Block:
    """The block with its streams' places in the signature."""
    return Block(module, streams, tuple(map(parameter_names(module).index, streams)))


def transformer_of(pipe: Any) -> nn.Module:
    """The pipeline's transformer.

    Raises:
        UnsupportedModelError: a U-Net pipeline, no transformer at all, or one inside torch.compile's wrapper.
    """
    transformer = getattr(pipe, "transformer", None)
    if is_compiled_module(transformer):
        raise UnsupportedModelError(
            "the transformer is wrapped by torch.compile(transformer), which hides its blocks; use transformer.compile(), or "
            "compile the blocks"
        )
    if isinstance(transformer, nn.Module):
        return transformer
    if getattr(pipe, "unet", None) is not None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has a U-Net; BlockDance reuses transformer blocks, DeepCache is made for U-Nets"
        )
    raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer; pass a diffusers pipeline that has one")


def stack_of(transformer: nn.Module) -> Stack | None:
    """The adapter of a transformer, found by class name over its bases; None if there is none.

    Raises:
        UnsupportedModelError: a class that reuse would break.
    """
    for base in type(transformer).__mro__:
        if base.__name__ in REFUSED:
            raise UnsupportedModelError(f"{base.__name__} is refused: {REFUSED[base.__name__]}")
        if base.__name__ in STACKS:
            return STACKS[base.__name__]
    return None


def blocks_of(transformer: nn.Module, stack: Stack) -> list[Block]:
    """The transformer's blocks in the order they run.

    Raises:
        UnsupportedModelError: fewer than two blocks, or one block used twice.
    """
    lists = [[located(module, names) for module in getattr(transformer, path)] for path, names in stack.returns.items()]
    blocks = list(chain(*zip(*lists, strict=True))) if stack.interleaved else list(chain(*lists))
    if len(blocks) < 2:
        raise UnsupportedModelError(f"reuse needs at least 2 blocks, {type(transformer).__name__} has {len(blocks)}")
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise UnsupportedModelError(f"{type(transformer).__name__} runs one block twice; its outputs cannot be told apart")
    return blocks


def guidance_rows(
    transformer: nn.Module, stack: Stack, branch: int, kwargs: dict[str, Any], model_rows: int, sample_rows: int
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
    names = ("conditional", "unconditional") if stack.conditional_first else ("unconditional", "conditional")
    return dict(zip(names, halves, strict=True))


def _half_null_labels(transformer: Any, kwargs: dict[str, Any]) -> bool:
    labels = kwargs.get("class_labels")
    if labels is None or len(labels) % 2:
        return False
    null = labels == transformer.config.num_embeds_ada_norm
    return bool(null[len(labels) // 2 :].all()) and not bool(null[: len(labels) // 2].any())
