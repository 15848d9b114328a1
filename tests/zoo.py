"""A tiny random model of every class that has an adapter (DiT and PixArt are in tests/tiny.py), and inputs for a call of it."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.tiny_video import WORDS as KNOWN_WORDS
from tests.tiny_video import STDiT, STDiT3, tiny_stdit
from tests.zoo_parts import (
    HEADS,
    IMAGE,
    TEXT,
    VIDEO,
    WIDTH,
    WORDS,
    Tiny,
    all_kept,
    awake,
    kept,
    moments,
    pairs,
    positions,
    rotary,
    rotary_3d,
    tiny,
)
from tests.zoo_recent import RECENT


class LoopSTDiT(STDiT):
    """Predicts the noise alone, and returns it as diffusers' models do."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, return_dict: bool = True) -> Any:
        return (super().forward(x, timestep, y, mask)[:, :4],)


class LoopSTDiT3(STDiT3):
    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, return_dict: bool = True) -> Any:
        return (super().forward(x, timestep, y),)


def opensora_1_0() -> nn.Module:
    model = tiny_stdit()
    model.__class__ = LoopSTDiT
    return model


def opensora_1_2() -> nn.Module:
    torch.manual_seed(0)
    return awake(LoopSTDiT3())


def video_inputs(*text: int) -> Callable[[int], dict[str, Any]]:
    def inputs(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(batch, *shape, generator=generator) for shape in (VIDEO, text))
        return {"x": x, "timestep": moments(batch), "y": y}

    return inputs


ZOO = [
    tiny(
        "SD3Transformer2DModel",
        {
            **HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "joint_attention_dim": WIDTH,
            "caption_projection_dim": 16, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS, pooled_projections=(WIDTH,),
    ),
    tiny(
        "FluxTransformer2DModel",
        {
            **HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 2, 2),
        },
        num_blocks=5,
        hidden_states=(16, 4), encoder_hidden_states=WORDS, pooled_projections=(WIDTH,),
        img_ids=positions(16), txt_ids=positions(TEXT),
    ),
    tiny(
        "Flux2Transformer2DModel",
        {
            **HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": WIDTH,
            "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2),
        },
        num_blocks=5,
        hidden_states=(16, 4), encoder_hidden_states=WORDS, img_ids=positions(16, 4), txt_ids=positions(TEXT, 4),
        guidance=lambda batch: torch.full((batch,), 4.0),
    ),
    tiny(
        "ChromaTransformer2DModel",
        {
            **HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 2, 2), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        num_blocks=5,
        hidden_states=(16, 4), encoder_hidden_states=WORDS, img_ids=positions(16), txt_ids=positions(TEXT),
    ),
    tiny(
        "AuraFlowTransformer2DModel",
        {
            **HEADS, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 3, "joint_attention_dim": WIDTH,
            "caption_projection_dim": 16, "pos_embed_max_size": 16,
        },
        num_blocks=5,
        hidden_states=IMAGE, encoder_hidden_states=WORDS,
    ),
    tiny(
        "QwenImageTransformer2DModel",
        {
            **HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 2, 2),
        },
        hidden_states=(16, 16), encoder_hidden_states=WORDS, encoder_hidden_states_mask=all_kept,
        img_shapes=lambda batch: [[(1, 4, 4)]] * batch,
    ),
    tiny(
        "SanaTransformer2DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDTH, "sample_size": 8,
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS,
    ),
    tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32), "cap_feat_dim": WIDTH,
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS, encoder_attention_mask=kept,
    ),
    tiny(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": WIDTH, "hidden_size": 16, "num_heads": 2, "depth": 4, "axes_dim": [4, 4]},
        hidden_states=IMAGE, encoder_hidden_states=WORDS, attention_mask=kept,
    ),
    tiny(
        "CogView4Transformer2DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_embed_dim": WIDTH, "time_embed_dim": 8,
            "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8),
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS,
        original_size=pairs(64.0, 64.0), target_size=pairs(64.0, 64.0), crop_coords=pairs(0.0, 0.0),
    ),
    tiny(
        "CogView3PlusTransformer2DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_embed_dim": WIDTH, "time_embed_dim": 8,
            "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8,
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS,
        original_size=pairs(64.0, 64.0), target_size=pairs(64.0, 64.0), crop_coords=pairs(0.0, 0.0),
    ),
    tiny(
        "LTXVideoTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 4, "caption_channels": WIDTH,
        },
        hidden_states=(32, 4), encoder_hidden_states=WORDS, encoder_attention_mask=kept,
        num_frames=lambda _: 2, height=lambda _: 4, width=lambda _: 4,
    ),
    tiny(
        "WanTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 8, "ffn_dim": 32, "num_layers": 4,
            "rope_max_seq_len": 32,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS,
    ),
    tiny(
        "HunyuanVideoTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "num_single_layers": 3, "num_refiner_layers": 1, "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH,
            "rope_axes_dim": (4, 2, 2),
        },
        num_blocks=5,
        hidden_states=VIDEO, encoder_hidden_states=WORDS, encoder_attention_mask=kept, pooled_projections=(WIDTH,),
        guidance=lambda batch: torch.full((batch,), 4.0),
    ),
    tiny(
        "MochiTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "num_layers": 4, "pooled_projection_dim": 16, "text_embed_dim": WIDTH,
            "time_embed_dim": 8, "max_sequence_length": TEXT,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS, encoder_attention_mask=kept,
    ),
    tiny(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "cross_attention_dim": 24,
            "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": WIDTH,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS,
        attention_mask=lambda batch: torch.ones(batch, 2, 8, 8), encoder_attention_mask=kept,
        image_rotary_emb=lambda _: rotary_3d(2, 4, 4),
    ),
    tiny(
        "CogVideoXTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": WIDTH, "num_layers": 4,
            "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": TEXT,
        },
        hidden_states=(2, 4, 8, 8), encoder_hidden_states=WORDS,
    ),
    tiny(
        "LatteTransformer3DModel",
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 16, "sample_size": 8,
            "patch_size": 2, "caption_channels": WIDTH, "video_length": 2, "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
            "attention_bias": True,
        },
        hidden_states=VIDEO, encoder_hidden_states=WORDS,
    ),
    Tiny("STDiT", opensora_1_0, video_inputs(1, TEXT, WIDTH), num_blocks=4, latent="x"),
    Tiny("STDiT3", opensora_1_2, video_inputs(WIDTH), num_blocks=4, latent="x"),
    tiny(
        "HunyuanDiT2DModel",
        {
            **HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "num_layers": 4,
            "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 4, "text_len": TEXT,
            "text_len_t5": TEXT, "learn_sigma": False, "activation_fn": "gelu-approximate",
        },
        hidden_states=IMAGE, encoder_hidden_states=WORDS, text_embedding_mask=kept, encoder_hidden_states_t5=WORDS,
        text_embedding_mask_t5=kept, image_meta_size=lambda batch: torch.ones(batch, 6),
        style=lambda batch: torch.zeros(batch, dtype=torch.long), image_rotary_emb=rotary(16, 8),
    ),
    *RECENT,
]  # fmt: skip


def sd3_pipeline(size: int = 8) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 in small: draws pictures of `size` pixels by flow matching."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=size, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=size,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=len(KNOWN_WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(KNOWN_WORDS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0)
    pipe = StableDiffusion3Pipeline(
        awake(transformer), FlowMatchEulerDiscreteScheduler(), vae.eval(), CLIPTextModelWithProjection(config).eval(),
        tokenizer(), CLIPTextModelWithProjection(config).eval(), tokenizer(), T5EncoderModel(t5).eval(), tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer() -> PreTrainedTokenizerFast:
    """Of a few words."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(KNOWN_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=77)
