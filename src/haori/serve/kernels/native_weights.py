"""Weights in 8 and 4 bits, packed for the kernels in C."""

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.kernels.native import BLOCK, LANES, OUTS, STRIPES, NativeKernels
from haori.serve.kernels.quantisation import GROUP, to_int4, to_int8

__all__ = ["NativeInt4Weight", "NativeInt8Weight"]

# Up to so many rows the kernels beat widening the weight and multiplying in 16 bits.
_FEW_ROWS_INT8, _FEW_ROWS_INT4 = 16, 8


class NativeInt8Weight:
    """A weight in 8 bits with one scale per output.

    Args:
        weight: The weight, shape (out D); out divides by `OUTS`.
        kernels: The kernels.
    """

    def __init__(self, weight: Tensor, kernels: NativeKernels) -> None:
        rounded, self._scales = to_int8(weight)
        self._packed = _together(_stripes(rounded).transpose(2, 3))  # out/4 blocks 4 LANES STRIPES
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        if x.shape[0] <= _FEW_ROWS_INT8:
            return self._kernels.int8_product(x.contiguous(), self._packed, self._scales)
        return functional.linear(x, self._kernels.widen_int8(self._packed, self._scales)[:, : x.shape[1]])


class NativeInt4Weight:
    """A weight in 4 bits with a step and a lowest value per group of inputs.

    Args:
        weight: The weight, shape (out D); out divides by `OUTS`, D by 32.
        kernels: The kernels.
    """

    def __init__(self, weight: Tensor, kernels: NativeKernels) -> None:
        levels, *scales = to_int4(weight)
        stripes = _stripes(levels).to(torch.int32)
        whole = sum(stripes[:, :, k] << 4 * k for k in range(STRIPES))
        self._packed = _together(torch.as_tensor(whole).to(torch.int16))  # out/4 blocks 4 LANES
        groups = self._packed.shape[1] * BLOCK // GROUP
        self._steps, self._lows = (
            functional.pad(part, (0, groups - part.shape[1])).to(torch.bfloat16).contiguous() for part in scales
        )
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        """Return W x, for x in bf16."""
        if x.shape[0] <= _FEW_ROWS_INT4:
            return self._kernels.int4_product(x.contiguous(), self._packed, self._steps, self._lows)
        wide = self._kernels.widen_int4(self._packed, self._steps, self._lows)
        return functional.linear(x, wide[:, : x.shape[1]])


def _together(blocks: Tensor) -> Tensor:
    """Let the same blocks of `OUTS` outputs lie side by side: (out blocks ...) to (out/OUTS blocks OUTS ...)."""
    return blocks.view(-1, OUTS, *blocks.shape[1:]).transpose(1, 2).contiguous()


def _stripes(weight: Tensor) -> Tensor:
    """Divide a weight (out D) into (out blocks STRIPES LANES), zeros behind its width."""
    return functional.pad(weight, (0, -weight.shape[1] % BLOCK)).view(len(weight), -1, STRIPES, LANES)
