"""Rounding of a weight to 8 or 4 bits, before a kernel's layout.

Eight bits: round(w / s) with s = max|row| / 127. Four bits: groups of `GROUP` inputs, each with a step and a lowest
value.
"""

import torch
from torch import Tensor

__all__ = ["GROUP", "to_int4", "to_int8"]

GROUP = 32


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out D) to 8 bits; return them and the fp32 scale of each output."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127.0  # out
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight (out D) to levels 0 to 15; return them and, per group of inputs, fp32 step and lowest value."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / 15.0).clamp(min=1e-8)
    levels = ((groups - low) / step).round().clamp(0, 15).to(torch.uint8)  # out groups 32
    return levels.flatten(1), step.squeeze(-1), low.squeeze(-1)
