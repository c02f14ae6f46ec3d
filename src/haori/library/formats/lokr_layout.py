"""The layout of LoKr in PEFT, which derives the shapes of both factors from one number (`decompose_factor`).

W [o, i, k, k] gains kron(w1 [a, b], w2 [c, d, k, k]) with o = a c and i = b d. PEFT factors w2 into w2_a [c, r] and
w2_b [r, d k k] where r is less than half of max(c, d), and keeps it whole otherwise. A factored one does not tell k, so
d is one of several numbers until the split is known.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError
from haori.library.updates import ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PeftFactors", "peft_factors"]

_KERNELS = (1, 3, 5, 7)


class PeftFactors(NamedTuple):
    """The tensors of one module as PEFT's LoKr holds them, the scale in w1, and the rank at which it builds them so."""

    tensors: "dict[str, Tensor]"
    rank: int


class _Sides(NamedTuple):
    """The sides of both factors: a, b, c and each d that the tensors allow."""

    first: tuple[int, int]
    outputs: int
    inputs: Sequence[int]


def peft_factors(
    modules: Mapping[str, ModuleUpdate], known_split: int | None = None
) -> tuple[dict[str, PeftFactors], int]:
    """Return the factors of each module as PEFT's LoKr can hold them, and `decompose_factor`.

    Args:
        modules: LoKr updates by module.
        known_split: `decompose_factor` that the adapter was made with, where that is on record.

    Raises:
        InputError: No one number gives PEFT the shapes of all modules.
    """
    firsts = {name: _first(update) for name, update in modules.items()}
    sides = {name: _sides(update, firsts[name]) for name, update in modules.items()}
    split = _split_of(sides, known_split)
    factors = {}
    for name, update in modules.items():
        inputs = next(side for side in sides[name].inputs if _splits(sides[name], side, split))
        factors[name] = _factors_of(update, firsts[name], inputs)
    return factors, split


def _first(update: ModuleUpdate) -> "Tensor":
    """Return w1 whole, with the scale."""
    found = {part: factor.double() for part, factor in update.factors.items() if part.startswith("w1")}
    whole = found["w1"] if "w1" in found else found["w1_a"] @ found["w1_b"]
    return (whole * update.scale).float()


def _sides(update: ModuleUpdate, first: "Tensor") -> _Sides:
    found, two = update.factors, (first.shape[0], first.shape[1])
    if "t2" in found:
        return _Sides(two, found["w2_a"].shape[1], (found["w2_b"].shape[1],))
    outputs, flat = (found["w2"].shape[:2]) if "w2" in found else (found["w2_a"].shape[0], found["w2_b"].shape[1])
    if update.shape is not None:
        return _Sides(two, outputs, (update.shape[1] // two[1],))
    if "w2" in found:
        return _Sides(two, outputs, (flat,))
    return _Sides(two, outputs, [flat // kernel**2 for kernel in _KERNELS if flat % kernel**2 == 0])


def _factors_of(update: ModuleUpdate, first: "Tensor", inputs: int) -> PeftFactors:
    """Return the factors of a module whose w2 has this many inputs."""
    import torch

    found = {part: factor.float() for part, factor in update.factors.items()}
    if "w2_a" in found and "t2" not in found:
        outputs, rank = found["w2_a"].shape
        if rank < max(outputs, inputs) / 2:
            return PeftFactors({"w1": first, "w2_a": found["w2_a"], "w2_b": found["w2_b"]}, rank)
        whole = found["w2_a"] @ found["w2_b"]
        kernel = (update.shape or ())[2:] or _kernel(whole.shape[1] // inputs)
        whole = whole.reshape(outputs, inputs, *kernel)
    elif "t2" in found:
        whole = torch.einsum("ij...,ip,jq->pq...", found["t2"], found["w2_a"], found["w2_b"])
    else:
        whole = found["w2"]
    return PeftFactors({"w1": first, "w2": whole}, (max(whole.shape[:2]) + 1) // 2)


def _kernel(area: int) -> tuple[int, ...]:
    side = round(area**0.5)
    return () if side == 1 else (side, side)


def _split_of(sides: Mapping[str, _Sides], known: int | None) -> int:
    """Return the `decompose_factor` that splits every output and input as the factors do."""
    candidates = [-1, *sorted({side for one in sides.values() for side in one.first})]
    for candidate in candidates if known is None else [known, *candidates]:
        if all(any(_splits(one, inputs, candidate) for inputs in one.inputs) for one in sides.values()):
            return candidate
    name, one = next(iter(sides.items()))
    raise InputError(
        f"PEFT's LoKr splits all weights by one number, and none gives the shapes of this adapter, such as "
        f"{list(one.first)} and {[one.outputs, one.inputs[0]]} of {name!r}; turn it into a LoRA first, by singular "
        "values."
    )


def _splits(sides: _Sides, inputs: int, split: int) -> bool:
    """Say whether PEFT splits a weight with this many inputs in w2 as the factors do."""
    from peft.tuners.lokr.layer import factorization

    (a, b), c = sides.first, sides.outputs
    return bool(factorization(a * c, split) == (a, c) and factorization(b * inputs, split) == (b, inputs))
