"""The decoding kernels in C, behind the same methods as `TorchKernels`. For bf16 on a CPU."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from haori.serve.adapter_arena import OuterFactor
from haori.serve.kernels import Angles, AttentionShape, Places, ShelfStep, TorchKernels
from haori.serve.native.compilation import compiled

__all__ = ["NativeKernels", "int8_product", "native_kernels"]

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "haori_update": [
        _POINTER, _INT, _POINTER, _INT, _INT, *[_POINTER] * 5, _INT, _INT, _INT, *[_POINTER] * 5, _POINTER, _INT,
    ],
    "haori_attend": [
        _POINTER, _INT, *[_POINTER] * 4, _INT, _POINTER, *[_INT] * 4, _FLOAT, _POINTER, _INT, _POINTER, _INT,
    ],
    "haori_add_norm": [*[_POINTER] * 5, _INT, _INT, _FLOAT],
    "haori_gate": [_POINTER, _POINTER, _INT, _INT],
    "haori_int8": [*[_POINTER] * 4, *[_INT] * 3],
}  # fmt: skip


class NativeKernels(TorchKernels):
    """The steps in C; what has one norm weight for each row goes to torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._c = library
        self._outer: dict[int, tuple[object, ...]] = {}

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return x + added, and its RMS norm times the weight."""
        if weight.dim() != 1:
            return super().add_norm(x, added, weight, epsilon)
        total, normed = torch.empty_like(x), torch.empty_like(x)
        self._c.haori_add_norm(
            x.data_ptr(), None if added is None else added.data_ptr(), total.data_ptr(), normed.data_ptr(),
            weight.data_ptr(), *x.shape, epsilon,
        )  # fmt: skip
        return total, normed

    def gate(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for [N, gate and up]."""
        out = both.new_empty(len(both), both.shape[1] // 2)
        self._c.haori_gate(both.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def attend(
        self, step: ShelfStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let the rows of a shelf write their keys and values and attend; the result goes to `out` [N, H d]."""
        shelf, first, width = step.shelf, step.rows.start, shape.width
        stride = shape.groups * (2 * width + shelf.capacity) + 16
        scratch = torch.empty(step.count * shape.kv_heads * stride, dtype=torch.float32)
        size = qkv.element_size()
        self._c.haori_attend(
            qkv.data_ptr() + first * qkv.stride(0) * size, qkv.stride(0),
            angles.cosines.data_ptr() + first * width * size, angles.sines.data_ptr() + first * width * size,
            shelf.keys[layer].data_ptr(), shelf.values[layer].data_ptr(), shelf.capacity, step.places.data_ptr(),
            step.count, shape.kv_heads, shape.groups, width, shape.scale,
            out.data_ptr() + first * out.stride(0) * size, out.stride(0), scratch.data_ptr(), stride,
        )  # fmt: skip

    def update(self, places: Places, a: Tensor, b: tuple[OuterFactor, ...], x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of single rows to y."""
        _, width, rank = a.shape
        columns = b[-1][3]
        stride = columns + rank + 16
        scratch = torch.empty(len(places.rows) * stride, dtype=torch.float32)
        modules, outer, low, high, left, right = self._bounds(b)
        self._c.haori_update(
            x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(places.rows), places.rows.data_ptr(),
            places.first.data_ptr(), places.slots.data_ptr(), places.strengths.data_ptr(), a.data_ptr(), width, rank,
            modules, outer, low, high, left, right, scratch.data_ptr(), stride,
        )  # fmt: skip

    def _bounds(self, b: tuple[OuterFactor, ...]) -> tuple[object, ...]:
        """Return the number of modules, the addresses of their B and their bounds, as arrays; made once per site."""
        key = b[0][4].data_ptr()
        known = self._outer.get(key)
        if known is None or known[-1] is not b:
            if len(self._outer) > 100_000:
                self._outer.clear()
            pointers = (_POINTER * len(b))(*(part[4].data_ptr() for part in b))
            bounds = [_integers([part[i] for part in b]) for i in range(4)]  # type: ignore[misc]
            known = self._outer[key] = (len(b), pointers, *bounds, b)
        return known[:-1]


def _integers(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    return (_INT * len(values))(*values)


def int8_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor | None:
    """Return x W^T for a weight in 8 bits (out D) with fp32 scales, or None where there are no kernels."""
    kernels = native_kernels()
    if kernels is None:
        return None
    y = x.new_empty(len(x), len(packed))
    kernels._c.haori_int8(x.data_ptr(), packed.data_ptr(), scales.data_ptr(), y.data_ptr(), *x.shape, len(packed))
    return y


@lru_cache(maxsize=1)
def native_kernels() -> NativeKernels | None:
    """Return the kernels in C, or None where they cannot be had."""
    library = compiled().library
    return None if library is None else NativeKernels(library)
