"""Weights of the base's linear layers in 16 or 32 bits, 8 bits or 4 bits, each a function from x to W x.

Eight bits: round(w / s) with s = max|row| / 127. Four bits: groups of 32 inputs, with a scale and a zero point each.
Few rows are multiplied by kernels that read the small weights, many by 16-bit products; activations are not rounded.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.kernels.native import OUTS, native_kernels
from haori.serve.kernels.native_weights import NativeInt4Weight, NativeInt8Weight
from haori.serve.kernels.quantisation import GROUP, to_int4, to_int8

__all__ = ["DenseWeight", "Int4Weight", "Int8Weight", "PackedWeight", "Weight", "WeightFormat", "pack_weight"]

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]

_FEW_ROWS = 16
_USUAL_ROWS = 32


class Weight(Protocol):
    """Maps x (N D) to W x (N out)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x."""
        ...


class DenseWeight:
    """A weight as it is, shape (out D)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x."""
        return functional.linear(x, self.weight)


class PackedWeight:
    """A weight in the layout that oneDNN multiplies with, in bf16 or fp32 on a CPU.

    With few rows a product spends much of its time bringing the weight into that layout: at 8 rows half of it, at 32
    rows a quarter.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return y


class Int8Weight:
    """A weight in 8 bits with one scale per output, multiplied by torch."""

    def __init__(self, weight: Tensor) -> None:
        self._packed, scale = to_int8(weight)
        self._scale = scale.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        if len(x) <= _FEW_ROWS and x.shape[1] % GROUP == 0:  # of other widths torch's kernel reads past the end
            return torch._weight_int8pack_mm(x.contiguous(), self._packed, self._scale)
        # Many rows: the product costs more than reading the weight, and the 16-bit one is faster.
        return functional.linear(x, self._packed.to(x.dtype)) * self._scale


class Int4Weight:
    """A weight in 4 bits with a step and a lowest value per group of inputs, multiplied by torch."""

    def __init__(self, weight: Tensor) -> None:
        levels, step, low = to_int4(weight)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 1)
        pairs = torch.stack([step, low + step * 8.0], -1)  # the kernel computes (q - 8) * step + zero
        self._steps = pairs.transpose(0, 1).contiguous().to(torch.bfloat16)  # groups out 2

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, GROUP, self._steps)


def pack_weight(weight: Tensor, form: WeightFormat) -> Weight:
    """Return a weight (out D) in a format; one whose width the 4-bit kernels do not take stays in 8 bits."""
    if form in {"int8", "int4"}:
        out, width = weight.shape
        kernels = native_kernels() if out % OUTS == 0 else None
        if form == "int4" and width % GROUP == 0 and out % 16 == 0:
            return Int4Weight(weight) if kernels is None else NativeInt4Weight(weight, kernels)
        return Int8Weight(weight) if kernels is None else NativeInt8Weight(weight, kernels)
    if form == "bf16" and weight.device.type == "cpu" and torch._C._has_mkldnn:
        return PackedWeight(weight)
    return DenseWeight(weight)
