"""Moves scales into factors, for programs that read them elsewhere or not at all."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.library.updates import ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["scaled", "with_one_alpha"]

_LARGEST_HALF = 65504
_ATTENTION = re.compile(r"unet\..*\.attn\d\.|text_encoder")


def scaled(factor: "Tensor", scale: float) -> "Tensor":
    """Multiply a factor: in its own dtype where that only moves its exponents, and else in float32."""
    import torch

    if scale == 1:
        return factor
    is_shift = abs(math.frexp(scale)[0]) == 0.5
    is_wide = factor.dtype in {torch.bfloat16, torch.float32, torch.float64}
    is_half_to_grow = factor.dtype == torch.float16 and scale > 1
    if is_shift and (is_wide or (is_half_to_grow and float(factor.abs().max()) * scale < _LARGEST_HALF)):
        return factor * scale
    return (factor if factor.dtype == torch.float64 else factor.float()) * scale


def with_one_alpha(modules: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Give attention layers of UNets, and text encoders, their component's commonest alpha; their dW stays the same.

    Of a kohya file with several alphas stock diffusers 0.42 loses those of exactly these layers, and gives them the
    commonest one.
    """
    alphas: dict[str, dict[str, float]] = {}
    for name, update in modules.items():
        if update.kind == "lora" and update.rank is not None:
            alphas.setdefault(name.partition(".")[0], {})[name] = update.scale * update.rank
    found = dict(modules)
    for of_component in alphas.values():
        common = Counter(of_component.values()).most_common(1)[0][0]
        for name, alpha in of_component.items():
            if alpha != common and common and _ATTENTION.match(name):
                factors = {**modules[name].factors, "B": scaled(modules[name].factors["B"], alpha / common)}
                found[name] = replace(modules[name], factors=factors, alpha=common, rslora=False)
    return found
