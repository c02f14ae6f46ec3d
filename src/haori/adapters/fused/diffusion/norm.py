"""Group norm with a frozen weight and the SiLU behind it, as one Function that keeps its input alone.

Stock code keeps the input, the norm's output for SiLU, and SiLU's output for the convolution behind it. A frozen
convolution needs no input, and the rest is computed again in backward.
"""

from typing import Any

import torch
from torch import Tensor, nn

from haori.adapters.fused.diffusion.kernels import kernels_for

__all__ = ["channels_last", "group_norm", "pictures", "places", "working_dtype"]


def group_norm(x: Tensor, norm: nn.GroupNorm, *, activate: bool, modulation: Tensor | None = None) -> Tensor:
    """Return act(norm(x) (1 + scale) + shift) in channels-last memory.

    Args:
        x: [B, C, H, W].
        norm: With frozen weights.
        activate: Whether act is SiLU, or nothing.
        modulation: [B, 2 C], scale beside shift, which gets no gradient; None for neither.
    """
    y: Tensor = _GroupNorm.apply(x, norm, activate, modulation)  # type: ignore[no-untyped-call]
    return y


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of autocast, or else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x [B, C, H, W] in a dtype, each place's channels side by side in memory."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def places(x: Tensor) -> Tensor:
    """Return channels-last x [B, C, H, W] as [B, HW, C], a view."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def pictures(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows [B, HW, C] as [B, C, H, W] of the height and width of `like`, a view."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm, activate: bool, modulation: Tensor | None) -> Tensor:
        ctx.x_dtype = x.dtype
        x = channels_last(x, working_dtype(x))
        weight, bias = (t.detach().float().expand(len(x), -1) for t in (norm.weight, norm.bias))  # [B, C]
        if modulation is not None:
            scale, shift = modulation.detach().float().chunk(2, 1)
            weight, bias = weight * (1 + scale), torch.addcmul(bias + shift, bias, scale)
        weight, bias = weight.contiguous(), bias.contiguous()
        y, mean, inverse = kernels_for(x).group_norm(
            places(x), weight, bias, norm.num_groups, norm.eps, activate=activate
        )
        ctx.groups, ctx.activate = norm.num_groups, activate
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return pictures(y, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        d = channels_last(grad, x.dtype)
        dx = kernels_for(x).group_norm_back(
            places(d), places(x), weight, bias, mean, inverse, ctx.groups, activate=ctx.activate
        )
        return pictures(dx, x).to(ctx.x_dtype), None, None, None
