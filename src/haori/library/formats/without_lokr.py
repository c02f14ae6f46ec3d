"""A LoKr update as one of another kind that equals it, for what a Kronecker product cannot express: some of its rows.

With w1 = P Q [a, b] and w2 = R S [c, d], where a matrix that is not factored is its own product with an identity:

- LoRA: kron(P Q, R S) = kron(P, R) kron(Q, S), of rank(Q) · rank(S).
- LoHa: each row of P stands c times and each column of Q d times in one half; R below itself a times and S beside
  itself b times are the other. Zeros make up the rank of the lower half.
- dW itself, where neither is smaller.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library.updates import ModuleUpdate

__all__ = ["without_lokr"]


def without_lokr(update: "ModuleUpdate") -> "ModuleUpdate":
    """Return a LoKr as the LoRA that it equals if that is smaller than dW, else as LoHa or dW; others as they are."""
    import torch

    shape = weight_shape(update)
    if update.kind != "lokr" or shape is None:
        return update
    if any(factor.dim() > 2 for factor in update.factors.values()):
        return _dense(update)
    p, q = _factored(update.factors, "w1")
    r, s = _factored(update.factors, "w2")
    ranks, values = (q.shape[0], s.shape[0]), math.prod(shape)
    if ranks[0] * ranks[1] * sum(shape) < values:
        a, b = torch.kron(q.float().contiguous(), s.float().contiguous()), torch.kron(p.float(), r.float().contiguous())
        return replace(update, kind="lora", factors={"A": a, "B": b}, alpha=update.scale * len(a), rslora=False)
    rank = max(ranks)
    if 2 * rank * sum(shape) >= values:
        return _dense(update)
    pad = torch.nn.functional.pad
    factors = {
        "w1_a": pad(p, (0, rank - ranks[0])).repeat_interleave(r.shape[0], dim=0),
        "w1_b": pad(q, (0, 0, 0, rank - ranks[0])).repeat_interleave(s.shape[1], dim=1),
        "w2_a": pad(r, (0, rank - ranks[1])).repeat(p.shape[0], 1),
        "w2_b": pad(s, (0, 0, 0, rank - ranks[1])).repeat(1, q.shape[1]),
    }
    return replace(update, kind="loha", factors=factors, alpha=update.scale * rank, rslora=False)


def _dense(update: "ModuleUpdate") -> "ModuleUpdate":
    return replace(update, kind="diff", factors={"diff": update.delta().float()}, alpha=None, rslora=False)


def _factored(factors: "Mapping[str, Tensor]", name: str) -> "tuple[Tensor, Tensor]":
    import torch

    if name not in factors:
        return factors[f"{name}_a"], factors[f"{name}_b"]
    whole = factors[name]
    rows, columns = whole.shape[0], whole.shape[1]
    one = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (whole, one) if columns <= rows else (one, whole)
