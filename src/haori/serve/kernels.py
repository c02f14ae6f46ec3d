"""The small steps of decoding, in plain torch: what stands between the large products of a layer.

`NativeKernels` does the same in C, faster; the two are interchangeable, and a test compares them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.kv_cache import Shelf
from haori.serve.packed_adapter import PackedAdapter, SitePlace

__all__ = [
    "HIDDEN",
    "ROWS_TOGETHER",
    "AdapterRows",
    "Angles",
    "AttentionShape",
    "Kernels",
    "Places",
    "ShelfStep",
    "TorchKernels",
    "norm",
    "rotate",
]

HIDDEN = -1e30  # score of a place that is not looked at; finite, so that nothing becomes NaN
ROWS_TOGETHER = 4  # rows under the same adapters that the kernel in C works on at once


class Angles(NamedTuple):
    """Rotary angles of the rows of a step, [N, d] each; the first half of the sines is negative.

    So the second half of a head turns into the first with the minus sign that it needs.
    """

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True)
class AttentionShape:
    """Heads of a model: query heads, key and value heads, numbers in a head, scale of the scores."""

    heads: int
    kv_heads: int
    width: int
    scale: float

    @property
    def groups(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class ShelfStep:
    """The decoding rows of one shelf: which rows of the step, and where in their sequences they stand.

    Attributes:
        shelf: The shelf; its first rows are these, in this order.
        rows: Rows of the step.
        places: Place of each row's new token.
        numbers: 0, 1, 2 ... to the number of rows.
    """

    shelf: Shelf
    rows: slice
    places: Tensor
    numbers: Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)


class AdapterRows(NamedTuple):
    """Rows of a step that one adapter acts on: the rows [n], and their strengths [n, 1] if not 1."""

    adapter: PackedAdapter
    rows: Tensor
    strengths: Tensor | None


@dataclass(frozen=True)
class Places:
    """Which adapters of one layout act on which rows, by adapter and by row.

    Attributes:
        by_adapter: By adapter.
        rows: Rows, those under the same adapters side by side.
        groups: Up to `ROWS_TOGETHER` of them under the same adapters: group g is rows[groups[g] : groups[g + 1]].
        first: The parts of group g are first[g] .. first[g + 1].
        adapters: Where the memory of each part's adapter begins.
        strengths: Its strength on each row of the group, [parts, ROWS_TOGETHER].
    """

    by_adapter: tuple[AdapterRows, ...]
    rows: Tensor
    groups: Tensor
    first: Tensor
    adapters: Tensor
    strengths: Tensor

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Return the number of groups, and where groups, rows, first, adapters and strengths lie."""
        tensors = (self.groups, self.rows, self.first, self.adapters, self.strengths)
        return (self.groups.shape[0] - 1, *(tensor.data_ptr() for tensor in tensors))


class Kernels(Protocol):
    """The steps between the products.

    Attributes:
        longest: Most rows of one run for which `update` is faster than plain products.
    """

    longest: int

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return x + added, and its RMS norm times the weight (one, or one for each row)."""
        ...

    def gate(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for [N, gate and up]."""
        ...

    def attend(
        self, step: ShelfStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let the rows of a shelf write their keys and values and attend; the result goes to `out` [N, H d]."""
        ...

    def update(self, places: Places, site: int, place: SitePlace, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of some rows to y."""
        ...


class TorchKernels:
    """The steps in plain torch, for every dtype and device."""

    longest = 8

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return x + added, and its RMS norm times the weight (one, or one for each row)."""
        total = x if added is None else x + added
        return total, norm(total, weight, epsilon)

    def gate(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for [N, gate and up]."""
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def attend(
        self, step: ShelfStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let the rows of a shelf write their keys and values and attend; the result goes to `out` [N, H d]."""
        count, groups = step.count, shape.groups
        split = qkv[step.rows].view(count, -1, shape.width)
        turned = rotate(split[:, : shape.heads + shape.kv_heads], angles, step.rows)
        k_cache, v_cache = step.shelf.keys[layer], step.shelf.values[layer]
        k_cache[step.numbers, :, step.places] = turned[:, shape.heads :]
        v_cache[step.numbers, :, step.places] = split[:, shape.heads + shape.kv_heads :]
        k = k_cache[:count].flatten(0, 1).transpose(1, 2)  # count*Hkv d T
        v = v_cache[:count].flatten(0, 1)  # count*Hkv T d
        q = turned[:, : shape.heads].reshape(-1, groups, shape.width)  # count*Hkv G d
        scores = torch.baddbmm(self._mask(step, shape, qkv.dtype), q, k, alpha=shape.scale)
        out[step.rows] = torch.bmm(torch.softmax(scores, -1), v).view(count, -1)

    def update(self, places: Places, site: int, place: SitePlace, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of some rows to y."""
        for adapter, rows, strengths in places.by_adapter:
            factors = adapter.factors[site]
            if factors is None or factors.a is None:
                continue
            t = x.index_select(0, rows) @ factors.a  # n R
            if strengths is not None:
                t *= strengths
            for module, b in zip(place.modules, factors.b, strict=True):
                y[:, module.left : module.right].index_add_(0, rows, t[:, module.low : module.high] @ b)

    def _mask(self, step: ShelfStep, shape: AttentionShape, dtype: torch.dtype) -> Tensor:
        capacity = step.shelf.capacity
        hidden = torch.arange(capacity, device=step.places.device) > step.places[:, None]  # count T
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)
        return mask[:, None, None].expand(-1, shape.kv_heads, shape.groups, -1).reshape(-1, shape.groups, capacity)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), with one weight or one for each row."""
    if weight.dim() == 1:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.rms_norm(x, x.shape[-1:], None, epsilon) * weight


def rotate(x: Tensor, angles: Angles, rows: slice) -> Tensor:
    """Turn [rows, heads, d] by the rotary angles of these rows of a step (arXiv 2104.09864); halves of d are pairs."""
    cosines, sines = (table[rows, None] for table in angles)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
