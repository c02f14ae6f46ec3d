"""The decoding kernels in C, behind the same methods as `TorchKernels`. For bf16 on a CPU."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from haori.core.native_code import NativeCode, native_code
from haori.serve.adapters.packed import SiteLayout
from haori.serve.kernels.torch_kernels import Angles, AttentionShape, AttentionStep, RowGroups, TorchKernels

__all__ = ["BLOCK", "LANES", "OUTS", "STRIPES", "NativeKernels", "compiled", "native_kernels"]

LANES, STRIPES, BLOCK, OUTS = 16, 4, 64, 4  # how weights of few bits are packed; as in kernels.c
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "haori_update": [
        _POINTER, _INT, _POINTER, _INT, _INT, *[_POINTER] * 5, *[_INT] * 4, *[_POINTER] * 5,
    ],
    "haori_attend": [_POINTER, _INT, *[_POINTER] * 7, *[_INT] * 4, _FLOAT, _POINTER, _INT],
    "haori_add_norm": [*[_POINTER] * 5, _INT, _INT, _FLOAT],
    "haori_gate": [_POINTER, _POINTER, _INT, _INT],
    "haori_int8": [*[_POINTER] * 4, *[_INT] * 3],
    "haori_int4": [*[_POINTER] * 5, *[_INT] * 3],
    "haori_widen_int8": [*[_POINTER] * 3, *[_INT] * 2],
    "haori_widen_int4": [*[_POINTER] * 4, *[_INT] * 2],
}  # fmt: skip


class NativeKernels(TorchKernels):
    """The operations in C; norms with a weight for each row are left to torch."""

    longest = 256

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._c = library

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
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        self._c.haori_gate(both.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def attend(
        self, step: AttentionStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let all rows write their keys and values and attend; the result goes to `out` [N, H d]."""
        if shape.width % LANES:
            super().attend(step, layer, qkv, angles, shape, out)
            return
        table = step.table
        count = table.rows.shape[0]
        if count:
            offset = 8 * layer * count
            self._c.haori_attend(
                qkv.data_ptr(), qkv.stride(0), angles.cosines.data_ptr(), angles.sines.data_ptr(),
                table.keys.data_ptr() + offset, table.values.data_ptr() + offset, table.rows.data_ptr(),
                table.capacities.data_ptr(), table.positions.data_ptr(), count, shape.kv_heads, shape.groups,
                shape.width, shape.scale, out.data_ptr(), out.stride(0),
            )  # fmt: skip
        for chunk in table.long_chunks:
            self.attend_chunk(chunk, step, layer, qkv, angles, shape, out)

    def update(self, groups: RowGroups, site: int, layout: SiteLayout, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of some rows to y."""
        self._c.haori_update(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), *groups.addresses, *layout.bounds)

    def int8_product(self, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        """Return x W^T for a packed weight in 8 bits with fp32 scales (out); x is contiguous and has few rows."""
        out = scales.shape[0]
        y = x.new_empty(x.shape[0], out)
        self._c.haori_int8(x.data_ptr(), packed.data_ptr(), scales.data_ptr(), y.data_ptr(), *x.shape, out)
        return y

    def int4_product(self, x: Tensor, packed: Tensor, steps: Tensor, lows: Tensor) -> Tensor:
        """Return x W^T for a packed weight in 4 bits with bf16 steps and lows; x is contiguous and has few rows."""
        out = steps.shape[0]
        y = x.new_empty(x.shape[0], out)
        self._c.haori_int4(
            x.data_ptr(), packed.data_ptr(), steps.data_ptr(), lows.data_ptr(), y.data_ptr(), *x.shape, out
        )
        return y

    def widen_int8(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Return a packed weight of 8 bits in bf16, its width rounded up to whole blocks."""
        out, blocks = len(scales), packed.shape[1]
        wide = torch.empty(out, blocks * BLOCK, dtype=torch.bfloat16)
        self._c.haori_widen_int8(packed.data_ptr(), scales.data_ptr(), wide.data_ptr(), blocks, out)
        return wide

    def widen_int4(self, packed: Tensor, steps: Tensor, lows: Tensor) -> Tensor:
        """Return a packed weight of 4 bits in bf16, its width rounded up to whole blocks."""
        out, blocks = len(steps), packed.shape[1]
        wide = torch.empty(out, blocks * BLOCK, dtype=torch.bfloat16)
        self._c.haori_widen_int4(packed.data_ptr(), steps.data_ptr(), lows.data_ptr(), wide.data_ptr(), blocks, out)
        return wide


@lru_cache(maxsize=1)
def native_kernels() -> NativeKernels | None:
    """Return the kernels in C, or None where they are not available."""
    library = compiled().library
    return None if library is None else NativeKernels(library)


def compiled() -> NativeCode:
    """Return the library of the kernels, or why there is none."""
    return native_code(Path(__file__).with_name("kernels.c"))
