"""The two small operations of a Llama-like block that stock code spreads over many passes: RMSNorm and rotation.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), w frozen.
Rotary positions (Su et al. 2021, arXiv 2104.09864): y = x * cos + rotate_half(x) * sin; its gradient is the rotation
back, by -sin.
"""

from typing import Any

import torch
from torch import Tensor

from haori.adapters.fused.kernels import kernels_for

__all__ = ["rms_norm", "rotate"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [..., D] with a frozen weight [D], in x's dtype."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] by positions; cos and sin are [B or 1, T, d] with equal halves."""
    y: Tensor = _Rotate.apply(x, cos.to(x.dtype), sin.to(x.dtype))  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = kernels_for(x, weight).rms(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        return kernels_for(grad, x, weight).rms_back(grad, x, weight, inverse), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels_for(x, cos, sin).rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return kernels_for(grad, cos, sin).rotate(grad, cos, sin, -1.0), None, None
