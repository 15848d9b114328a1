"""What blocks hold, as pictures: the first three principal components of a block's output, as in the paper's Fig. 3."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHOWN_QUANTILES = (0.01, 0.99)
"""Values beyond these are shown as the darkest and the brightest."""


def shown_blocks(num_blocks: int) -> tuple[int, int, int]:
    """A shallow, a middle and a deep block: block 1, the one in the middle, and the last but one."""
    return min(1, num_blocks - 1), num_blocks // 2, max(0, num_blocks - 2)


def component_pictures(states: Tensor) -> NDArray[np.uint8] | None:
    """The first three principal components over the tokens of all steps, as red, green and blue.

    One basis for the whole run, so that a colour means the same on every step; each step is centred and scaled by
    itself, since the length of hidden states changes along the run.

    Args:
        states: (steps, tokens, width), the tokens a square grid, row by row.

    Returns:
        uint8 (steps, side, side, 3); None if the tokens are no square.
    """
    steps, tokens, _ = states.shape
    side = math.isqrt(tokens)
    if side * side != tokens:
        return None
    centred = states.float() - states.float().mean(dim=1, keepdim=True)
    centred = centred / centred.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    flat = centred.flatten(0, 1)
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending
    basis = vectors[:, -3:].flip(1)
    basis = basis * torch.sign(basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)))  # a sign that does not depend on luck
    values = flat @ basis
    low, high = (torch.quantile(values, q, dim=0) for q in SHOWN_QUANTILES)
    shown = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    pictures: NDArray[np.uint8] = shown.round().byte().reshape(steps, side, side, 3).numpy()
    return pictures
