"""What a policy sees of a run."""

from typing import Any

from torch import Tensor

from blockdance.adapters import guidance_rows
from blockdance.part import ModelCall
from blockdance.policy import Moment


def moment_of(call: ModelCall, sample_rows: int, num_steps: int) -> Moment:
    """Of a call, which is the first of its step; `sample_rows` are those of the latent that is stepped."""
    denoiser = call.denoiser
    named = denoiser.named(call.args, call.kwargs)
    rows = guidance_rows(denoiser.transformer, denoiser.stack, call.branch, named, call.rows, sample_rows)["conditional"]
    text, mask = [None if one is None else one[rows] for one in words_of(named)]
    return Moment(named[denoiser.latent_name][rows], text, mask, num_steps)


def words_of(named: dict[str, Any]) -> tuple[Any, Any]:
    """The text among a transformer's arguments, (b, tokens, d), and its mask, as diffusers or as Open-Sora names them.

    Open-Sora's text is (b, 1, tokens, d), and with guidance its mask has the conditional rows alone, which come first. What
    else is called `y`, as one vector for all words, is not seen.
    """
    y = named.get("y")
    if isinstance(y, Tensor) and y.is_floating_point() and y.ndim == 4:
        return y.flatten(1, 2), named.get("mask")
    return named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
