"""The two small operations of a Llama-like block that stock code spreads over many passes: RMSNorm and rotation.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), w frozen.
Rotary positions (Su et al. 2021, arXiv 2104.09864): y = x * cos + rotate_half(x) * sin; its gradient is the rotation
back, by -sin.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["rms_norm", "rotate"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [..., D] with a frozen weight [D], in x's dtype."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] by positions; cos and sin are [B or 1, T, d] with equal halves."""
    cos, sin = (t.unsqueeze(2).to(x.dtype) for t in (cos, sin))  # [B or 1, T, 1, d]
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = (x * inverse).to(x.dtype)
        return y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        scaled = grad * weight  # [..., D]
        dot = (scaled * x).sum(-1, keepdim=True, dtype=torch.float32)
        dx = scaled * inverse
        dx.addcmul_(x, dot.mul_(inverse.pow(3)).div_(-x.shape[-1]))
        return dx.to(x.dtype), None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return y
