"""How the changes of several adapters to one weight become one: TIES, DARE and KnOTS.

Each takes what every adapter changes, [out, in], with a weight for each, and the plain sum is sum_i w_i dW_i.

- TIES (Yadav et al. 2023, arXiv 2306.01708, section 4.2): of each change only the `density` largest values stay; for
  each position the sign with the greater total is elected, and the values of that sign are averaged. A weight
  multiplies its adapter's values after the election, as in PEFT: with all weights 1 it is the paper's merge at
  lambda = 1. Trimmed per weight matrix, as in PEFT; the authors' code trims over the whole model at once.
- DARE (Yu et al. 2023, arXiv 2311.03099, section 3.2): each value stays with the probability `density` and is then
  divided by it; what is left is summed, or goes through the election of TIES.
- KnOTS (Stoica et al. 2024, arXiv 2410.19735, section 4): [dW_1, ..., dW_n] = U S [V_1, ..., V_n]; the V_i, which
  share one basis, are merged as above, and U S V is the result. Its rank is at most the sum of the ranks.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from haori.core.errors import InputError, nearest
from haori.library.combining.factors import Factors

__all__ = ["METHODS", "Merge", "knots", "merge_of"]

Merge = Callable[[Sequence[Tensor], Sequence[float], float, int], Tensor]
"""Makes one tensor of several alike in shape, with their weights, the density, and a seed for what is random."""


def merge_of(method: str) -> Merge:
    """Return what a method does with values, leaving out whether that is done in the basis of KnOTS.

    Raises:
        InputError: There is no such method.
    """
    if method not in METHODS:
        raise InputError(f"There is no way of blending called {method[:40]!r}; " + _hint(method))
    return METHODS[method]


def _linear(values: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(dim=0)


def _ties(values: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    return _elect([_trim(value, density) for value in values], weights)


def _dare(values: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    return _linear(_drop(values, density, seed), weights, density, seed)


def _dare_ties(values: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    return _elect(_drop(values, density, seed), weights)


METHODS: Mapping[str, Merge] = {
    "linear": _linear,
    "ties": _ties,
    "dare": _dare,
    "dare-ties": _dare_ties,
    "knots-ties": _ties,
    "knots-dare-ties": _dare_ties,
}
"""What each method does with values; those of KnOTS do it with the V_i."""


def knots(parts: Sequence[Factors], weights: Sequence[float], merge: Merge, density: float, seed: int) -> Factors:
    """Return U S V with V merged from the V_i of a joint singular value decomposition.

    With B = [B_1, ..., B_n] = Q R it is that of the small matrix [R_1 A_1, ..., R_n A_n], R_i the columns of B_i.

    Args:
        parts: The changes as B_i A_i.
        weights: Their weights.
        merge: What makes one V of the V_i.
        density: Its density.
        seed: Its seed.
    """
    q, r = torch.linalg.qr(torch.cat([part.b for part in parts], dim=1))
    columns = r.split([part.rank for part in parts], dim=1)
    joint = torch.cat([block @ part.a for block, part in zip(columns, parts, strict=True)], dim=1)  # [R, n · in]
    u, s, vh = torch.linalg.svd(joint, full_matrices=False)
    kept = max(1, int((s > s[0] * torch.finfo(s.dtype).eps * max(joint.shape)).sum()))
    merged = merge(vh[:kept].chunk(len(parts), dim=1), weights, density, seed)  # [R, in]
    shape = next((part.shape for part in parts if len(part.shape) > 2), parts[0].shape)
    return Factors(q @ (u[:, :kept] * s[:kept]), merged, shape)


def _trim(value: Tensor, density: float) -> Tensor:
    if density >= 1:
        return value
    largest = value.abs().flatten().topk(int(density * value.numel())).indices
    kept = torch.zeros(value.numel(), dtype=torch.bool).index_fill_(0, largest, True)
    return value * kept.reshape(value.shape)


def _drop(values: Sequence[Tensor], density: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        value * torch.empty(value.shape).bernoulli_(density, generator=generator).to(value.dtype) / density
        for value in values
    ]


def _elect(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stack = torch.stack(list(values))  # [N, out, in]
    agrees = stack.sign() == torch.where(stack.sum(dim=0) >= 0, 1, -1)
    weighted = stack * torch.tensor(list(weights), dtype=stack.dtype).reshape(-1, *[1] * (stack.dim() - 1))
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _hint(method: str) -> str:
    return nearest(method, METHODS) or f"there are {', '.join(METHODS)}."
