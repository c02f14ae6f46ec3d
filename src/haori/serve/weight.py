"""Weights of the base's linear layers in 16 or 32 bits, 8 bits or 4 bits, each a function from x to W x.

Eight bits: round(w / s) with s = max|row| / 127. Four bits: groups of 32 inputs, with a scale and a zero point each.
Products run in kernels of torch that read the small weights and multiply in 16 bits, so activations are not rounded.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.native.calls import int8_product

__all__ = ["DenseWeight", "Int4Weight", "Int8Weight", "PackedWeight", "Weight", "WeightFormat", "pack_weight"]

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]

_GROUP = 32
_FEW_ROWS = 16
_NATIVE_ROWS = 4
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
    """A weight in 8 bits with one scale per output."""

    def __init__(self, weight: Tensor) -> None:
        scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127.0  # out
        self._exact = scale
        self._scale = scale.to(torch.bfloat16)
        self._packed = (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        if len(x) <= _NATIVE_ROWS and (y := int8_product(x.contiguous(), self._packed, self._exact)) is not None:
            return y
        if len(x) <= _FEW_ROWS:
            return torch._weight_int8pack_mm(x.contiguous(), self._packed, self._scale)
        # Many rows: the product costs more than reading the weight, and the 16-bit one is faster.
        return functional.linear(x, self._packed.to(x.dtype)) * self._scale


class Int4Weight:
    """A weight in 4 bits, with scale and zero point per group of inputs."""

    def __init__(self, weight: Tensor) -> None:
        out, width = weight.shape
        groups = weight.float().view(out, width // _GROUP, _GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15.0).clamp(min=1e-8)
        zero = low + scale * 8.0  # the kernel computes (q - 8) * scale + zero
        levels = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).view(out, width)
        self._packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1)
        pairs = torch.cat([scale, zero], -1)  # out groups 2
        self._scales = pairs.transpose(0, 1).contiguous().to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self._packed, _GROUP, self._scales)


def pack_weight(weight: Tensor, form: WeightFormat) -> Weight:
    """Return a weight (out D) in a format; one whose width the 4-bit kernel does not take stays in 8 bits."""
    if form == "int8":
        return Int8Weight(weight)
    if form == "int4":
        out, width = weight.shape
        return Int4Weight(weight) if width % _GROUP == 0 and out % 16 == 0 else Int8Weight(weight)
    if form == "bf16" and weight.device.type == "cpu" and torch._C._has_mkldnn:
        return PackedWeight(weight)
    return DenseWeight(weight)
