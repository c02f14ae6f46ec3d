"""A LoKr update as the LoRA that it equals, for what Kronecker products cannot express, such as some rows of one.

With w1 = P Q and w2 = R S, kron(P Q, R S) = kron(P, R) kron(Q, S); a matrix that is not factored is its own product
with an identity. The rank is that of w1 times that of w2.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library.updates import ModuleUpdate

__all__ = ["lokr_as_lora"]


def lokr_as_lora(update: "ModuleUpdate") -> "ModuleUpdate":
    """Return a LoKr as the LoRA that it equals, or as dW itself where that is smaller; others as they are."""
    import torch

    if update.kind != "lokr":
        return update
    factors = {name: factor.float() for name, factor in update.factors.items()}
    shape = weight_shape(update)
    assert shape is not None
    p, q = _factored(factors, "w1")
    r, s = _factored(factors, "w2")
    rank = q.shape[0] * s.shape[0]
    has_kernel = any(factor.dim() > 2 for factor in factors.values())
    if has_kernel or rank * (shape[0] + shape[1]) >= math.prod(shape):
        return replace(update, kind="diff", factors={"diff": update.delta().float()}, alpha=None, rslora=False)
    lora = {"A": torch.kron(q.contiguous(), s.contiguous()), "B": torch.kron(p.contiguous(), r.contiguous())}
    alpha = None if update.scale == 1 else update.scale * rank
    return replace(update, kind="lora", factors=lora, alpha=alpha, rslora=False)


def _factored(factors: "Mapping[str, Tensor]", name: str) -> "tuple[Tensor, Tensor]":
    import torch

    if name not in factors:
        return factors[f"{name}_a"], factors[f"{name}_b"]
    whole = factors[name]
    rows, columns = whole.shape[0], whole.shape[1]
    one = torch.eye(min(rows, columns))
    return (whole, one) if columns <= rows else (one, whole)
