"""The layout of LoKr in PEFT, which derives the shapes of both factors from one number (`decompose_factor`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.library.updates import ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["full_factors"]


def full_factors(modules: Mapping[str, ModuleUpdate]) -> "tuple[dict[str, dict[str, Tensor]], int, int]":
    """Return w1 and w2 of each module, whole and with the scale in w1, as PEFT's LoKr can hold them.

    Returns:
        The factors by module, `decompose_factor`, and a rank at which PEFT builds every w2 whole.

    Raises:
        InputError: No one number gives PEFT the shapes of all modules.
    """
    import torch

    factors = {}
    for name, update in modules.items():
        found = {part: factor.to(torch.float32) for part, factor in update.factors.items()}
        w1 = found["w1"] if "w1" in found else found["w1_a"] @ found["w1_b"]
        w2 = _second(found)
        if update.shape is not None and len(update.shape) > w2.dim():
            w2 = w2.reshape(w2.shape[0], update.shape[1] // w1.shape[1], *update.shape[2:])
        factors[name] = {"w1": (w1.double() * update.scale).float(), "w2": w2}
    shapes = {name: (tuple(pair["w1"].shape), tuple(pair["w2"].shape[:2])) for name, pair in factors.items()}
    rank = max((side + 1) // 2 for _, second in shapes.values() for side in second)
    return factors, _split_of(shapes), max(rank, 1)


def _second(found: "Mapping[str, Tensor]") -> "Tensor":
    import torch

    if "w2" in found:
        return found["w2"]
    if "t2" in found:
        return torch.einsum("ij...,ip,jq->pq...", found["t2"], found["w2_a"], found["w2_b"])
    return found["w2_a"] @ found["w2_b"]


def _split_of(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """Return the `decompose_factor` that splits every output and input as the factors do."""
    from peft.tuners.lokr.layer import factorization

    candidates = [-1, *sorted({side for first, _ in shapes.values() for side in first})]
    for candidate in candidates:
        if all(
            factorization(first[axis] * second[axis], candidate) == (first[axis], second[axis])
            for first, second in shapes.values()
            for axis in (0, 1)
        ):
            return candidate
    name, (first, second) = next(iter(shapes.items()))
    raise InputError(
        f"PEFT's LoKr splits all weights by one number, and none gives the shapes of this adapter, such as "
        f"{list(first)} and {list(second)} of {name!r}; turn it into a LoRA first, by singular values."
    )
