"""A video model that begins as a picture model, as Open-Sora 1.0 began as PixArt-alpha.

Every weight of the picture's blocks has its place in an STDiT block; attention over time starts without effect. So before
training each frame is exactly the picture that the picture model draws from that frame's noise.
"""

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from blockdance.models.stdit import STDiT

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
}
"""Layers, by their names in PixArt and in STDiT."""
IN_BLOCKS = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
STACKED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
"""Layers of an STDiT block that hold several of PixArt's, one below the other."""


@torch.no_grad()
def inflated(picture: PixArtTransformer2DModel, null_text: Tensor, frames: int, words: int) -> STDiT:
    """The STDiT that draws so many frames, each as `picture` would.

    Args:
        picture: with patches of one latent pixel, and as many channels out as in.
        null_text: the text encoder's output for no prompt, one token (caption channels,).
        frames: of the video.
        words: text tokens, at most.
    """
    config = picture.config
    model = STDiT(
        input_size=(frames, config.sample_size, config.sample_size), in_channels=config.in_channels, patch_size=(1, 1, 1),
        hidden_size=config.num_attention_heads * config.attention_head_dim, depth=config.num_layers,
        num_heads=config.num_attention_heads, caption_channels=config.caption_channels, model_max_length=words,
    )  # fmt: skip
    old, new = picture.state_dict(), model.state_dict()
    for kind in ("weight", "bias"):
        for source, target in OUTSIDE.items():
            new[f"{target}.{kind}"].copy_(old[f"{source}.{kind}"].reshape(new[f"{target}.{kind}"].shape))
        for index in range(config.num_layers):
            block, other = f"blocks.{index}", f"transformer_blocks.{index}"
            for source, target in IN_BLOCKS.items():
                new[f"{block}.{target}.{kind}"].copy_(old[f"{other}.{source}.{kind}"])
            for target, sources in STACKED.items():
                new[f"{block}.{target}.{kind}"].copy_(torch.cat([old[f"{other}.{source}.{kind}"] for source in sources]))
        new[f"final_layer.linear.{kind}"][: config.out_channels].copy_(old[f"proj_out.{kind}"])  # the variance stays zero
    for index in range(config.num_layers):
        table = f"{index}.scale_shift_table"
        new[f"blocks.{table}"].copy_(old[f"transformer_blocks.{table}"])
    new["final_layer.scale_shift_table"].copy_(old["scale_shift_table"])
    new["y_embedder.y_embedding"].copy_(null_text.expand(words, -1))
    return model
