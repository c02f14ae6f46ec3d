"""Which factors belong together, and the shape of the weight that they change.

Knows the kinds of `updates.py` and nothing of files: a reader calls `fault_of` on what it put together.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from haori.library.updates import FACTORS, Kind

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library.updates import ModuleUpdate

__all__ = ["fault_of", "weight_shape"]

_MOST = 5  # dimensions of the weight of a convolution over video
# Least and most dimensions of tensors that are not always matrices.
_DIMENSIONS = {
    **dict.fromkeys(("A", "B", "mid", "t1", "t2", "w2"), (2, _MOST)),
    **dict.fromkeys(("diff", "the magnitude"), (1, _MOST)),
    "the bias": (1, 1),
}


def fault_of(update: "ModuleUpdate") -> str | None:
    """Say why the tensors of an update give no change of a weight, as the end of a sentence; None if they do."""
    kind, factors = update.kind, update.factors
    if unknown := sorted(set(factors) - FACTORS[kind]):
        return f"{unknown[0]} is no factor of {kind}"
    if missing := _missing(kind, factors, update.bias is not None):
        return f"{missing} is missing"
    rest = {"the magnitude": update.magnitude, "the bias": update.bias}
    for name, tensor in {**factors, **{name: tensor for name, tensor in rest.items() if tensor is not None}}.items():
        if not tensor.dtype.is_floating_point:
            return f"{name} is of dtype {str(tensor.dtype).removeprefix('torch.')}, not of floating-point numbers"
        least, most = _DIMENSIONS.get(name, (2, 2))
        if not tensor.numel() or not least <= tensor.dim() <= most:
            return f"{name} has the shape {list(tensor.shape)}"
    if pair := _unfit_pair(kind, factors):
        first, second = pair
        return (
            f"{first} of shape {list(factors[first].shape)} and {second} of shape {list(factors[second].shape)} "
            "do not fit together"
        )
    return _unfit_rest(update)


def weight_shape(update: "ModuleUpdate") -> tuple[int, ...] | None:
    """Return the shape of the weight that an update changes, as far as its tensors tell it.

    A convolution's under LoHa or LoKr without Tucker is [out, in * k...] unless `shape` is known. None for an update
    of a bias alone.
    """
    if update.shape is not None:
        return tuple(update.shape)
    factors = update.factors
    size = {name: tuple(factor.shape) for name, factor in factors.items()}
    if update.kind == "lora":
        kernel = size["mid"][2:] if "mid" in size else size["A"][2:]
        return (size["B"][0], size["A"][1], *kernel)
    if update.kind == "loha":
        if "t1" in size:
            return (size["w1_a"][1], size["w1_b"][1], *size["t1"][2:])
        return (size["w1_a"][0], size["w1_b"][1])
    if update.kind == "lokr":
        first = size["w1"] if "w1" in size else (size["w1_a"][0], size["w1_b"][1])
        second = _second_of_lokr(size)
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    return size.get("diff")


def _second_of_lokr(size: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if "w2" in size:
        return size["w2"]
    if "t2" in size:
        return (size["w2_a"][1], size["w2_b"][1], *size["t2"][2:])
    return (size["w2_a"][0], size["w2_b"][1])


def _missing(kind: Kind, factors: "Mapping[str, Tensor]", has_bias: bool) -> str | None:
    wanted: dict[Kind, tuple[tuple[str, ...], ...]] = {
        "lora": (("A",), ("B",)),
        "loha": (("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",)),
        "lokr": (("w1", "w1_a"), ("w1", "w1_b"), ("w2", "w2_a"), ("w2", "w2_b")),
        "diff": () if has_bias else (("diff",),),
    }
    for either in wanted[kind]:
        if not any(name in factors for name in either):
            return " or ".join(either)
    if twice := sorted(name for name in ("w1", "w2") if name in factors and f"{name}_a" in factors):
        return f"what {twice[0]} is, itself or the product of {twice[0]}_a and {twice[0]}_b,"
    if kind == "loha" and ("t1" in factors) != ("t2" in factors):
        return "t2" if "t1" in factors else "t1"
    return None


def _unfit_pair(kind: Kind, factors: "Mapping[str, Tensor]") -> tuple[str, str] | None:
    """Return two factors whose ranks differ; the axis of the rank is behind each name."""
    pairs: list[tuple[str, int, str, int]] = []
    if kind == "lora":
        pairs = [("A", 0, "B", 1)] if "mid" not in factors else [("A", 0, "mid", 1), ("B", 1, "mid", 0)]
    for which in ("1", "2"):
        a, b, core = f"w{which}_a", f"w{which}_b", f"t{which}"
        if core in factors:
            pairs += [(a, 0, core, 0), (b, 0, core, 1)]
        elif a in factors:
            pairs.append((a, 1, b, 0))
    for first, axis, second, other in pairs:
        if second not in factors or factors[first].shape[axis] != factors[second].shape[other]:
            return (first, second) if second in factors else None
    return None


def _unfit_rest(update: "ModuleUpdate") -> str | None:
    factors = update.factors
    if update.kind == "lora":
        kernel = factors["B"].shape[2:] if "mid" not in factors else (*factors["B"].shape[2:], *factors["A"].shape[2:])
        if any(size != 1 for size in kernel):
            return f"the second of its two convolutions is of size {list(factors['B'].shape[2:])}, not 1 x 1"
    if update.kind == "loha":
        halves = [
            (
                factors[f"w{n}_a"].shape[1 if f"t{n}" in factors else 0],
                factors[f"w{n}_b"].shape[1],
                *(factors[f"t{n}"].shape[2:] if f"t{n}" in factors else ()),
            )
            for n in ("1", "2")
        ]
        if halves[0] != halves[1]:
            return f"its two halves have the shapes {list(halves[0])} and {list(halves[1])}"
    shape = weight_shape(update)
    if shape is None:
        return None
    if update.bias is not None and len(update.bias) != shape[0]:
        return f"the bias of shape {list(update.bias.shape)} does not fit a weight of shape {list(shape)}"
    if update.magnitude is None:
        return None
    sizes = {shape[0], shape[1] if len(shape) > 1 else shape[0]}
    flattened = update.kind in {"loha", "lokr"} and len(shape) == 2  # a kernel may be hidden in its inputs
    count = update.magnitude.numel()
    if count in sizes or (flattened and count and math.prod(shape[1:]) % count == 0):
        return None
    return f"the magnitude of shape {list(update.magnitude.shape)} does not fit a weight of shape {list(shape)}"
