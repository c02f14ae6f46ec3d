"""What a diffusion model's training step does between its matrix products, each in one pass over the numbers.

Group norm with the SiLU behind it (Wu & He 2018, arXiv 1803.08494) and the gate of the feed-forward layers, GEGLU
(Shazeer 2020, arXiv 2002.05202). bf16 on a CPU is computed by kernels.c where there is a C compiler, with sums in fp32;
everything else by torch. Weights and biases of norms are frozen.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from haori.core.native_code import NativeCode, native_code

__all__ = ["NativeKernels", "TorchKernels", "compiled", "kernels_for"]

_WIDEST = 4096  # channels that kernels.c has room for


class TorchKernels:
    """The steps in plain torch, for every dtype and device."""

    def group_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, activate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y = act((x - mean) / sqrt(var + eps) * weight + bias), and mean and 1/sqrt of each channel's group.

        Args:
            x: [B, P, C], P places of C channels.
            weight: [B, C], fp32, contiguous.
            bias: [B, C], fp32, contiguous.
            groups: Groups of channels; mean and variance are those of a group's channels at all places.
            eps: Added to the variance.
            activate: Whether act is SiLU, or nothing.
        """
        batch, places, channels = x.shape
        wide = x.float().view(batch, places, groups, channels // groups)
        var, mean = torch.var_mean(wide, (1, 3), correction=0, keepdim=True)  # [B, 1, G, 1]
        inverse = (var + eps).rsqrt_()
        n = ((wide - mean) * inverse).view(x.shape).mul_(weight.unsqueeze(1)).add_(bias.unsqueeze(1))
        each = (batch, 1, groups, channels // groups)
        mean, inverse = (t.expand(each).reshape(batch, channels) for t in (mean, inverse))
        return (silu(n) if activate else n).to(x.dtype), mean, inverse

    def group_norm_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, groups: int,
        *, activate: bool,
    ) -> Tensor:  # fmt: skip
        """Return dx of `group_norm` [B, P, C]."""
        batch, places, channels = x.shape
        z = (x.float() - mean.unsqueeze(1)).mul_(inverse.unsqueeze(1))
        weight = weight.unsqueeze(1)
        d = grad.float()
        if activate:
            d = torch.ops.aten.silu_backward(d, z * weight + bias.unsqueeze(1))
        d = (d * weight).view(batch, places, groups, channels // groups)
        z = z.view(d.shape)
        dx = d - d.mean((1, 3), keepdim=True) - z * (d * z).mean((1, 3), keepdim=True)
        return dx.view(x.shape).mul_(inverse.unsqueeze(1)).to(x.dtype)

    def geglu(self, both: Tensor) -> Tensor:
        """Return left * gelu(right) [N, I] for both = [left, right] [N, 2 I]."""
        left, right = both.chunk(2, -1)
        return left * gelu(right)

    def geglu_back(self, grad: Tensor, both: Tensor) -> Tensor:
        """Return the gradient of both [N, 2 I]."""
        left, right = both.chunk(2, -1)
        return torch.cat([grad * gelu(right), torch.ops.aten.gelu_backward(grad * left, right)], -1)


_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "haori_group_norm": [*[_POINTER] * 6, *[_INT] * 4, _FLOAT, _INT],
    "haori_group_norm_back": [*[_POINTER] * 7, *[_INT] * 5],
    "haori_geglu": [*[_POINTER] * 2, _INT, _INT],
    "haori_geglu_back": [*[_POINTER] * 3, _INT, _INT],
}


class NativeKernels(TorchKernels):
    """The steps in C, for bf16 on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._c = library

    def group_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, activate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in torch."""
        if x.shape[-1] > _WIDEST:
            return super().group_norm(x, weight, bias, groups, eps, activate=activate)
        x = x.contiguous()
        y, mean = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
        inverse = torch.empty_like(mean)
        self._c.haori_group_norm(*_at(x, weight, bias, y, mean, inverse), *x.shape, groups, eps, activate)
        return y, mean, inverse

    def group_norm_back(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, groups: int,
        *, activate: bool,
    ) -> Tensor:  # fmt: skip
        """As in torch."""
        if x.shape[-1] > _WIDEST:
            return super().group_norm_back(grad, x, weight, bias, mean, inverse, groups, activate=activate)
        grad, x = grad.contiguous(), x.contiguous()
        dx = torch.empty_like(x)
        self._c.haori_group_norm_back(*_at(grad, x, weight, bias, mean, inverse, dx), *x.shape, groups, activate)
        return dx

    def geglu(self, both: Tensor) -> Tensor:
        """As in torch."""
        both = both.contiguous()
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        self._c.haori_geglu(*_at(both, out), *out.shape)
        return out

    def geglu_back(self, grad: Tensor, both: Tensor) -> Tensor:
        """As in torch."""
        grad, both = grad.contiguous(), both.contiguous()
        out = torch.empty_like(both)
        self._c.haori_geglu_back(*_at(grad, both, out), *grad.shape)
        return out


_TORCH = TorchKernels()


def kernels_for(*tensors: Tensor) -> TorchKernels:
    """Return what computes on these: the kernels in C for bf16 on a CPU, else torch."""
    if all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors):
        return _native() or _TORCH
    return _TORCH


def compiled() -> NativeCode:
    """Return the library of the kernels, or why there is none."""
    return native_code(Path(__file__).with_name("kernels.c"))


@lru_cache(maxsize=1)
def _native() -> NativeKernels | None:
    library = compiled().library
    return None if library is None else NativeKernels(library)


def _at(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
