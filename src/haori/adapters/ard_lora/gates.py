"""The arithmetic of gates: rank factor a, amount t = r0 a, gates g_i = clamp(t - i + 1, 0, 1).

Gates are a function of the stored parameter rho alone, so a reloaded adapter has the gates of the live one. An
amount within a thousandth of a whole number counts as that number: float32 cannot hit r / r0 exactly, and gates that
are exactly 0 or 1 make pruning exact. H heads, R rank indices.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["amounts", "bounds", "gates", "open_ranks", "rho_of_rank", "rounded_ranks"]

_WHOLE = 1e-3


def rho_of_rank(rank: float, start: int) -> float:
    """Return rho with r0 softplus(rho) = rank, where `start` is r0."""
    return math.log(math.expm1(rank / start))


def bounds(start: int) -> tuple[float, float]:
    """Return rho of the ranks 1 and 2 r0, between which alone it has an effect."""
    return rho_of_rank(1, start), rho_of_rank(2 * start, start)


def amounts(rho: "Tensor", start: int) -> "Tensor":
    """Return t = r0 softplus(rho) [H] between 1 and 2 r0, in fp32."""
    raw = start * functional.softplus(rho.float())
    off = raw.detach().round() - raw.detach()
    # Added rather than assigned: the gradient goes through.
    return (raw + torch.where(off.abs() < _WHOLE, off, 0.0)).clamp(1, 2 * start)


def gates(amount: "Tensor", width: int) -> "Tensor":
    """Return the gates [H, R] of amounts t [H] at the first `width` rank indices; the first is always 1."""
    return (amount[:, None] - torch.arange(width, device=amount.device)).clamp(0, 1)


def open_ranks(rho: "Tensor", start: int) -> list[int]:
    """Return per head how many gates are not closed."""
    return [int(rank) for rank in amounts(rho.detach(), start).ceil().tolist()]


def rounded_ranks(rhos: "Sequence[Tensor]", start: int) -> "list[Tensor]":
    """Return r = max(1, round(r0 a)) per head, as the rho that gives this rank exactly."""
    whole = torch.cat([amounts(rho.detach(), start) for rho in rhos]).round()
    return list(torch.split((whole / start).expm1().log(), [rho.numel() for rho in rhos]))
