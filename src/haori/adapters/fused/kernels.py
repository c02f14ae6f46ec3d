"""What a training step does between its matrix products, each in one pass over the numbers.

In plain torch these steps take a sixth of a step on a CPU, for every operation reads and writes whole matrices again.
Where there is a C compiler, bf16 on a CPU is computed by kernels.c instead, with sums in fp32 and one rounding at the
end; everything else by torch.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from haori.core.native_code import NativeCode, native_code

__all__ = ["ACTIVATIONS", "Activation", "NativeKernels", "TorchKernels", "compiled", "kernels_for"]

_CACHE_ELEMENTS = 1 << 19
_TINY = 1e-30


class Activation(NamedTuple):
    """An activation and its gradient: `backward(dy, x)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")  # type: ignore[no-any-return]


ACTIVATIONS = {
    "silu": Activation(torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward),
}


class TorchKernels:
    """The steps in plain torch, for every dtype and device."""

    def rms(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return y = w * x / sqrt(mean(x^2) + eps) for x [..., D], and the fp32 factors of the rows [..., 1]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
        y: Tensor = (x * inverse).to(x.dtype)
        return y.mul_(weight), inverse

    def rms_back(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """Return dx of `rms` [..., D]."""
        scaled = grad * weight
        dot = (scaled * x).sum(-1, keepdim=True, dtype=torch.float32)
        dx = scaled * inverse
        dx.addcmul_(x, dot.mul_(inverse.pow(3)).div_(-x.shape[-1]))
        return dx.to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """Return x cos + sign rotate_half(x) sin for x [B, T, H, d] and angles [B or 1, T, d]."""
        half = x.shape[-1] // 2
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
        return y

    def gate(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """Return act(gate) * up [N, I]."""
        return activation.forward(gate).mul_(up)

    def gate_back(
        self, grad: Tensor, gate: Tensor, up: Tensor, activation: Activation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return h = act(gate) * up and the gradients of gate and up [N, I]; the gradient of h is used up."""
        a = activation.forward(gate)
        h = a * up
        d_up = a.mul_(grad)
        return h, activation.backward(grad.mul_(up), gate), d_up

    def residuals(self, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
        """Write the loss of each row into `losses` [n], and softmax - onehot over `logits` [n, V].

        A few rows at a time, which stay in a core's cache; the softmax is fp32 whatever the dtype of the logits.
        """
        rows = max(1, _CACHE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(targets)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            wanted = targets[part].unsqueeze(1)
            p = torch.softmax(logits[part], -1, dtype=torch.float32)
            of_target = p.gather(1, wanted)
            losses[part] = of_target.log().neg_().squeeze(1)
            if (of_target < _TINY).any():  # too unlikely for the logarithm of an fp32 probability
                whole = logits[part].float()
                losses[part] = torch.logsumexp(whole, -1) - whole.gather(1, wanted).squeeze(1)
            logits[part] = p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))


_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "haori_rms": [*[_POINTER] * 4, _INT, _INT, _FLOAT],
    "haori_rms_back": [*[_POINTER] * 5, _INT, _INT],
    "haori_rotate": [*[_POINTER] * 4, *[_INT] * 4, _FLOAT],
    "haori_gate": [*[_POINTER] * 3, _INT, _INT],
    "haori_gate_back": [*[_POINTER] * 5, _INT, _INT],
    "haori_residuals": [*[_POINTER] * 3, _INT, _INT],
}


class NativeKernels(TorchKernels):
    """The steps in C, for bf16 on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._c = library

    def rms(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As in torch."""
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
        self._c.haori_rms(*_at(x, weight, y, inverse), inverse.numel(), x.shape[-1], eps)
        return y, inverse

    def rms_back(self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        """As in torch."""
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        dx = torch.empty_like(x)
        self._c.haori_rms_back(*_at(grad, x, weight, inverse, dx), inverse.numel(), x.shape[-1])
        return dx

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        """As in torch."""
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        positions = cos.shape[0] * cos.shape[1]  # as many as rows, or those of each row of the batch
        self._c.haori_rotate(*_at(x, cos, sin, y), x.shape[0] * x.shape[1], positions, *x.shape[2:], sign)
        return y

    def gate(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """As in torch."""
        if activation is not ACTIVATIONS["silu"]:
            return super().gate(gate, up, activation)
        gate, up = gate.contiguous(), up.contiguous()
        h = torch.empty_like(gate)
        self._c.haori_gate(*_at(gate, up, h), *gate.shape)
        return h

    def gate_back(
        self, grad: Tensor, gate: Tensor, up: Tensor, activation: Activation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in torch."""
        if activation is not ACTIVATIONS["silu"]:
            return super().gate_back(grad, gate, up, activation)
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        h, d_up = torch.empty_like(gate), torch.empty_like(gate)
        self._c.haori_gate_back(*_at(grad, gate, up, h, d_up), *gate.shape)
        return h, grad, d_up

    def residuals(self, logits: Tensor, targets: Tensor, losses: Tensor) -> None:
        """As in torch."""
        if not (logits.is_contiguous() and losses.is_contiguous()):
            super().residuals(logits, targets, losses)
            return
        targets = targets.contiguous()
        self._c.haori_residuals(*_at(logits, targets, losses), *logits.shape)


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
