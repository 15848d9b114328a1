"""Where the blocks of a transformer are: one line per diffusers class, matched by class name."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from blockdance.errors import UnsupportedModelError

Streams = tuple[Tensor, ...]
"""What flows from block to block: the image's hidden state, and in some models the text's or the sound's beside it. One that a
call leaves out is a tensor without numbers, (rows, 0)."""


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
    "BriaFiboTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "BriaTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "ChromaTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "CogVideoXTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "CogView3PlusTransformer2DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "CogView4Transformer2DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "CosmosTransformer3DModel": Stack({"transformer_blocks": IMAGE}),
    "DiTTransformer2DModel": Stack({"transformer_blocks": IMAGE}, conditional_first=True),
    "Flux2Transformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": IMAGE}),
    "Flux3Transformer2DModel": Stack({"mode_blocks.image": IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "FluxTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "HunyuanImageTransformer2DModel": Stack({"transformer_blocks": IMAGE_TEXT, "single_transformer_blocks": IMAGE_TEXT}),
    "HunyuanVideo15Transformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "HunyuanVideoTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT, "single_transformer_blocks": IMAGE_TEXT}),
    "Kandinsky5Transformer3DModel": Stack({"visual_transformer_blocks": ("visual_embed",)}),
    "Kandinsky6Transformer3DModel": Stack({"visual_transformer_blocks": ("vis", "aud")}),
    "LTX2VideoTransformer3DModel": Stack({"transformer_blocks": ("hidden_states", "audio_hidden_states")}),
    "LTXVideoTransformer3DModel": Stack({"transformer_blocks": IMAGE}),
    "LatteTransformer3DModel": Stack({"transformer_blocks": IMAGE, "temporal_transformer_blocks": IMAGE}, interleaved=True),
    "LongCatImageTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "Lumina2Transformer2DModel": Stack({"layers": IMAGE}),
    "MochiTransformer3DModel": Stack({"transformer_blocks": IMAGE_TEXT}),
    "OvisImageTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE, "single_transformer_blocks": TEXT_IMAGE}),
    "PRXTransformer2DModel": Stack({"blocks": IMAGE}),
    "PixArtTransformer2DModel": Stack({"transformer_blocks": IMAGE}),
    "QwenImageTransformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE}),
    "SD3Transformer2DModel": Stack({"transformer_blocks": TEXT_IMAGE}),
    "STDiT": Stack({"blocks": ("x",)}, conditional_first=True),
    "STDiT3": Stack({"spatial_blocks": ("x",), "temporal_blocks": ("x",)}, interleaved=True, conditional_first=True),
    "SanaTransformer2DModel": Stack({"transformer_blocks": IMAGE}),
    "SkyReelsV2Transformer3DModel": Stack({"blocks": IMAGE}),
    "WanTransformer3DModel": Stack({"blocks": IMAGE}),
    "ZImageTransformer2DModel": Stack({"layers": ("x",)}),
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


BESIDE_THE_IMAGE = ("encoder", "text", "txt", "context", "caption", "prompt", "audio", "aud")
"""How the names begin of streams that flow beside the image's."""


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
        """Which of the returned streams is the image's (or the video's): the first argument not named otherwise."""
        beside = [name.startswith(BESIDE_THE_IMAGE) or name == "c" for name in self.streams]
        return min(range(len(self.streams)), key=lambda stream: (beside[stream], self.places[stream]))

    @property
    def is_single(self) -> bool:
        """Whether there is one stream alone."""
        return len(self.streams) == 1

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams among a call's arguments, in the order in which they are returned."""
        if self.is_single:
            return (self.passed(args, kwargs),)
        return _filled(
            [
                args[place] if place < len(args) else kwargs.get(name)
                for place, name in zip(self.places, self.streams, strict=True)
            ]
        )

    def passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would return if it did nothing."""
        if not self.is_single:
            return self.returning(self.inputs(args, kwargs))
        place = self.places[0]
        return args[place] if place < len(args) else kwargs[self.streams[0]]

    def outputs(self, returned: Any) -> Streams:
        """The streams of what the block returned."""
        return (returned,) if self.is_single else _filled(returned)

    def returning(self, streams: Streams) -> Any:
        """What the block would return for these streams."""
        return streams[0] if self.is_single else tuple(None if one.shape[1:] == (0,) else one for one in streams)


def _filled(streams: Sequence[Tensor | None]) -> Streams:
    """With a tensor without numbers for each that is left out, as Kandinsky 6 leaves out the sound of a silent video."""
    given = next(stream for stream in streams if stream is not None)
    return tuple(given.new_empty(len(given), 0) if stream is None else stream for stream in streams)


def parameter_names(module: nn.Module) -> list[str]:
    """The parameters of its class's `forward`; an instance may carry a wrapped one.

    What only hands on (*args, **kwargs) is looked through: a class to its bases, and a wrapper, as those of torch.compile, of
    checkpointing and of FSDP, to the one module inside. Empty where that leads nowhere.
    """
    names, inside = _names_of(type(module)), list(module.children())
    return names if names or len(inside) != 1 else parameter_names(inside[0])


def _names_of(cls: type) -> list[str]:
    """The named parameters of the first `forward` among a class and its bases that has any."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
            names = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
            if names:
                return names
    return []


def located(module: nn.Module, streams: tuple[str, ...]) -> Block:
    """The block with its streams' places in the signature.

    Raises:
        UnsupportedModelError: its `forward` names no such parameter.
    """
    names = parameter_names(module)
    if not set(streams) <= set(names):
        takes = ", ".join(names) or "(*args, **kwargs), and is no wrapper around one module"
        raise UnsupportedModelError(f"cannot find {' and '.join(streams)} in a block: {type(module).__name__} takes {takes}")
    return Block(module, streams, tuple(map(names.index, streams)))


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
        UnsupportedModelError: no block, one block used twice, or one that takes other arguments than the stack says.
    """
    lists = [[located(module, names) for module in attrgetter(path)(transformer)] for path, names in stack.returns.items()]
    blocks = list(chain(*zip(*lists, strict=True))) if stack.interleaved else list(chain(*lists))
    if not blocks:
        raise UnsupportedModelError(f"{type(transformer).__name__} has no blocks whose outputs could be reused")
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise UnsupportedModelError(f"{type(transformer).__name__} runs one block twice; its outputs cannot be told apart")
    return blocks


def guidance_rows(
    transformer: nn.Module,
    stack: Stack,
    branch: int,
    kwargs: dict[str, Any],
    model_rows: int,
    sample_rows: int,
    null_half: bool | None = None,
) -> dict[str, slice]:
    """Which rows of one transformer call belong to which guidance branch.

    Guidance in several calls is recognised by `branch` (conditional first, as diffusers' pipelines do); guidance in one
    batch by the call having several times the rows of the latent (PixArt twice, with perturbed attention three times), or
    null labels in one half (DiT, whose latent is doubled too).

    Args:
        null_half: what `has_null_half` says, if it is known; looking there waits for the device.
    """
    if branch:
        return {branch_names(branch + 1, True)[branch]: slice(0, model_rows)}
    copies = model_rows // sample_rows if sample_rows and model_rows % sample_rows == 0 else 1
    if copies == 1 and (has_null_half(transformer, kwargs) if null_half is None else null_half):
        copies = 2
    rows = model_rows // copies
    names = branch_names(copies, stack.conditional_first or copies == 1)
    return {name: slice(place * rows, (place + 1) * rows) for place, name in enumerate(names)}


def branch_names(count: int, conditional_first: bool) -> list[str]:
    """The first `count` guidance branches, in the order in which they stand in a batch."""
    guided = ["conditional", "unconditional"] if conditional_first else ["unconditional", "conditional"]
    perturbed = ["perturbed", *(f"perturbed {number}" for number in range(2, count - 1))]
    return [*guided, *perturbed][:count]


def has_null_half(transformer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the second half of a call's class labels, and nothing of the first, is the null label that guidance needs.

    Reads labels on the host, which waits for the device: they stay the same, so once a run is enough.
    """
    labels = kwargs.get("class_labels")
    if labels is None or len(labels) % 2:
        return False
    null = labels == transformer.config.num_embeds_ada_norm
    return bool(null[len(labels) // 2 :].all()) and not bool(null[: len(labels) // 2].any())
