"""Tiny models of the classes that came to diffusers last."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from tests.zoo_parts import HEADS, IMAGE, TEXT, VIDEO, WIDTH, WORDS, Tiny, all_kept, awake, kept, moments, positions, tiny


class LoopZImage(ZImageTransformer2DModel):
    """Takes and returns tensors; what it is made of takes and returns lists with one for each picture."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> Any:
        pictures = list(hidden_states.unsqueeze(2))
        returned = super().forward(pictures, timestep / 1000, list(encoder_hidden_states), return_dict=False)[0]
        return (torch.stack(returned).squeeze(2),)


class LoopKandinsky5(Kandinsky5Transformer3DModel):
    """Returns a tuple, as the other models do; its time embedding stays in single precision, as `from_pretrained` keeps it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.time_embeddings.float()
        return (super().forward(*args, **kwargs | {"return_dict": False}),)


def z_image() -> nn.Module:
    torch.manual_seed(0)
    config = {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16, "n_layers": 4, "n_refiner_layers": 1,
        "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH, "axes_dims": [4, 2, 2], "axes_lens": [256, 32, 32],
    }  # fmt: skip
    return awake(LoopZImage(**config))


def kandinsky_5() -> nn.Module:
    torch.manual_seed(0)
    config = {
        "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 8, "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1,
        "num_visual_blocks": 4, "axes_dims": (4, 2, 2),
    }  # fmt: skip
    model = awake(LoopKandinsky5(**config))
    for name, parameter in model.named_parameters():
        if "modulation" in name:  # all of which begin at zero: as strong as elsewhere they would blow up what is rounded off
            nn.init.normal_(parameter, std=0.1)
    return model


def drawn(shapes: dict[str, tuple[int, ...]], **more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    """Inputs of these shapes, one sample's each, and more."""

    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        tensors = {name: torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
        return tensors | {"timestep": moments(batch)} | {name: what(batch) for name, what in more.items()}

    return inputs


def layers(count: int, width: int) -> Callable[[int], list[Tensor]]:
    """What each of as many layers of a text encoder says."""

    def text(batch: int) -> list[Tensor]:
        return list(torch.randn(count, batch, TEXT, width, generator=torch.Generator().manual_seed(2)))

    return text


def none_kept(batch: int) -> Tensor:
    return torch.zeros(batch, TEXT, dtype=torch.bool)


FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": WIDTH}
FLUX_INPUTS: dict[str, Any] = {
    "hidden_states": (16, 4), "encoder_hidden_states": WORDS, "img_ids": positions(16), "txt_ids": positions(TEXT),
}  # fmt: skip

RECENT = [
    tiny("BriaTransformer2DModel", {**FLUX, "axes_dims_rope": (4, 2, 2)}, num_blocks=5, **FLUX_INPUTS),
    tiny(
        "BriaFiboTransformer2DModel", {**FLUX, "axes_dims_rope": (4, 2, 2), "text_encoder_dim": 8},
        num_blocks=5, text_encoder_layers=layers(5, 8), **FLUX_INPUTS,
    ),
    tiny("LongCatImageTransformer2DModel", {**FLUX, "axes_dims_rope": (4, 2, 2)}, num_blocks=5, **FLUX_INPUTS),
    tiny("OvisImageTransformer2DModel", {**FLUX, "out_channels": 4, "axes_dims_rope": (4, 2, 2)}, num_blocks=5, **FLUX_INPUTS),
    tiny(
        "Flux3Transformer2DModel",
        {**FLUX, "num_layers": 1, "num_single_layers": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        num_blocks=5,
        hidden_states=(16, 4), encoder_hidden_states=WORDS, img_ids=positions(16, 4), txt_ids=positions(TEXT, 4),
    ),
    tiny(
        "HunyuanImageTransformer2DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1,
            "patch_size": (2, 2), "text_embed_dim": WIDTH, "rope_axes_dim": (4, 4),
        },
        num_blocks=5,
        hidden_states=IMAGE, encoder_hidden_states=WORDS, encoder_attention_mask=kept,
    ),
    tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_refiner_layers": 1, "text_embed_dim": WIDTH,
            "text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": (4, 2, 2), "patch_size": 2,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS, encoder_attention_mask=all_kept, encoder_hidden_states_2=WORDS,
        encoder_attention_mask_2=none_kept, image_embeds=lambda batch: torch.zeros(batch, 3, WIDTH),
    ),
    tiny(
        "LTX2VideoTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "audio_in_channels": 4,
            "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8, "num_layers": 4, "caption_channels": WIDTH,
        },
        hidden_states=(32, 4), audio_hidden_states=(6, 4), encoder_hidden_states=WORDS, audio_encoder_hidden_states=WORDS,
        encoder_attention_mask=kept, audio_encoder_attention_mask=kept,
        num_frames=lambda _: 2, height=lambda _: 4, width=lambda _: 4, audio_num_frames=lambda _: 6,
    ),
    tiny(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 8,
            "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4, "axes_dims": (4, 2, 2),
            "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4, "model_dim_a": 8, "axes_dims_a": (4, 2, 2),
        },
        hidden_states=(2, 8, 8, 4), encoder_hidden_states=WORDS, pooled_projections=(WIDTH,), audio_hidden_states=(6, 4),
    ),
    tiny(
        "SkyReelsV2Transformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 8, "ffn_dim": 32, "num_layers": 4,
            "rope_max_seq_len": 32,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS,
    ),
    tiny(
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4,
            "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 8, 8),
            "concat_padding_mask": False, "extra_pos_embed_type": None,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS,
    ),
    Tiny("ZImageTransformer2DModel", z_image, drawn({"hidden_states": IMAGE, "encoder_hidden_states": WORDS})),
    Tiny(
        "Kandinsky5Transformer3DModel", kandinsky_5,
        drawn(
            {"hidden_states": (2, 8, 8, 4), "encoder_hidden_states": WORDS, "pooled_projections": (WIDTH,)},
            visual_rope_pos=lambda _: tuple(map(torch.arange, (2, 4, 4))), text_rope_pos=lambda _: torch.arange(TEXT),
        ),
    ),
]  # fmt: skip
