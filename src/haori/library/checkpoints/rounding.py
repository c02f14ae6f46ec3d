"""Float64 rounded once to the dtype of a weight.

torch turns float64 into 16 bits by way of fp32, which rounds twice: of 65,536 sums one or two come out a unit off.
That needs an fp32 in the middle between two neighbours, so only such numbers are looked at again.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Rounder", "nearest_of", "round_once"]

# Bits of fp32 below the one that decides where a 16-bit number is rounded to; in the middle they are all zero.
_BELOW = {torch.bfloat16: (1 << 15) - 1, torch.float16: (1 << 12) - 1}


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 numbers rounded to a dtype, to the nearest, ties to even."""
    return Rounder(exact.numel(), dtype)(exact.contiguous()).clone()


class Rounder:
    """Rounds piece after piece in the same memory: getting it from the system again and again takes longer.

    Args:
        size: Most numbers of a piece.
        dtype: What they are rounded to.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        import numpy as np

        self._near = torch.empty(size, dtype=torch.float32)
        self._rounded = torch.empty(size, dtype=dtype)
        self._low = np.empty(size, dtype=np.int32)

    def __call__(self, exact: Tensor) -> Tensor:
        """Return contiguous float64 numbers rounded to the nearest, ties to even; until the next call."""
        import numpy as np

        flat, count = exact.view(-1), exact.numel()
        rounded = self._rounded[:count]
        if rounded.dtype not in _BELOW:
            return rounded.copy_(flat).view(exact.shape)
        near = self._near[:count].copy_(flat)
        rounded.copy_(near)
        bits: Any = near.view(torch.int32).numpy()
        low = np.bitwise_and(bits, _BELOW[rounded.dtype], out=self._low[:count])
        places = torch.from_numpy(np.flatnonzero(low == 0))
        if len(places):
            rounded[places] = _by_way_of_odd(flat[places]).to(rounded.dtype)
        return rounded.view(exact.shape)


def nearest_of(values: Tensor, exact: Tensor, *, slack: float = 0.0) -> Tensor:
    """Say of each value whether no neighbour of it in its dtype is nearer to the exact number.

    Args:
        values: Finite numbers of 16 or 32 bits.
        exact: What they should be, in float64.
        slack: Share by which a neighbour may be nearer all the same.
    """
    kind = torch.int16 if values.element_size() == 2 else torch.int32 if values.element_size() == 4 else torch.int64
    error = (values.double() - exact).abs()
    found = torch.ones(values.shape, dtype=torch.bool)
    bits = values.view(kind)
    for step in (1, -1):
        # One further from zero, or nearer to it; beyond zero lies the smallest number of the other sign.
        stepped = torch.where(
            (bits & torch.iinfo(kind).max) + step < 0, (bits ^ torch.iinfo(kind).min) + 1, bits + step
        )
        found &= error <= (stepped.view(values.dtype).double() - exact).abs().nan_to_num(torch.inf) * (1 + slack)
    return found


def _by_way_of_odd(exact: Tensor) -> Tensor:
    """Return fp32 whose next rounding is the only one: cut towards zero, the last bit set if anything was lost.

    Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd", theorem 3.
    """
    near = exact.float()
    back = near.double()
    lost = (back != exact) & exact.isfinite() & back.isfinite()
    bits = near.view(torch.int32)
    cut = bits - ((back.abs() > exact.abs()) & lost).int()
    return (cut | lost.int()).view(torch.float32)
