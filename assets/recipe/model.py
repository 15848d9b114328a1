"""The parts of the model in the box before training: tokenizer, text encoder, transformer, scheduler."""

from collections.abc import Iterable

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from assets.recipe.autoencoder import LATENT_CHANNELS

MAX_WORDS = 16
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer(captions: list[list[str]], styles: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """One token per style and per word that occurs in a caption, `</s>` at the end, everything else `<unk>`."""
    known = sorted({word for group in captions for caption in group for word in caption.split()} | set(styles))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *known])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation(behavior="removed")])
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_WORDS
    )


def build_text_encoder(vocabulary_size: int, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size, d_model=width, d_kv=32, num_heads=4, d_ff=2 * width, num_layers=2,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )
    )  # fmt: skip


def build_transformer(blocks: int, width: int) -> PixArtTransformer2DModel:
    """64 tokens of 16 numbers; the output layer starts at zero, so the first prediction is the mean."""
    transformer = PixArtTransformer2DModel(
        num_layers=blocks, num_attention_heads=width // 32, attention_head_dim=32, cross_attention_dim=width,
        caption_channels=width, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, sample_size=8, patch_size=1,
        interpolation_scale=1, use_additional_conditions=False,
    )  # fmt: skip
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    torch.nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)
    return transformer


def build_scheduler(prediction: str) -> DDIMScheduler:
    """Velocity is trained down to pure noise (zero terminal SNR); noise prediction cannot be."""
    velocity = prediction == "v_prediction"
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        prediction_type=prediction, rescale_betas_zero_snr=velocity, timestep_spacing="trailing" if velocity else "leading",
        steps_offset=0 if velocity else 1,
    )  # fmt: skip
