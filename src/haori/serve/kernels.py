"""The small steps of decoding, in plain torch: what stands between the large products of a layer.

`NativeKernels` does the same in C, faster; the two are interchangeable, and a test compares them.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.adapter_arena import OuterFactor
from haori.serve.kv_cache import Shelf

__all__ = ["HIDDEN", "Angles", "AttentionShape", "Kernels", "Places", "ShelfStep", "TorchKernels", "norm", "rotate"]

HIDDEN = -1e30  # score of a place that is not looked at; finite, so that nothing becomes NaN


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


@dataclass(frozen=True)
class Places:
    """Which adapters of one arena act on which single rows.

    The first form is by row: row rows[i] has the parts first[i] .. first[i + 1], each a slot and a strength. The second
    is by slot: `ranges` of slots with as many places for rows in each, `gather` the row at each place, and back[k] the
    place where each row finds its k-th update (the place behind the last holds zeros).
    """

    rows: Tensor
    first: Tensor
    slots: Tensor
    strengths: Tensor
    ranges: tuple[tuple[int, int, int, int], ...]  # first slot, slots, places in each, first place
    gather: Tensor
    gathered_strengths: Tensor | None
    back: tuple[Tensor, ...]


class Kernels(Protocol):
    """The steps between the products."""

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

    def update(self, places: Places, a: Tensor, b: tuple[OuterFactor, ...], x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of single rows to y."""
        ...


class TorchKernels:
    """The steps in plain torch, for every dtype and device."""

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

    def update(self, places: Places, a: Tensor, b: tuple[OuterFactor, ...], x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of single rows to y: one batched product for each range of slots."""
        inner = x.index_select(0, places.gather)  # places D
        t = x.new_empty(len(inner), a.shape[2])
        full = sum(right - left for _, _, left, right, _ in b) == y.shape[1]
        result = (x.new_empty if full else x.new_zeros)((len(inner) + 1, y.shape[1]))
        result[-1] = 0.0
        for first, count, depth, offset in places.ranges:
            span = slice(offset, offset + count * depth)
            product = t[span].view(count, depth, -1)
            torch.bmm(inner[span].view(count, depth, -1), a[first : first + count], out=product)
            if places.gathered_strengths is not None:
                product *= places.gathered_strengths[span].view(count, depth, 1)
            target = result[span].view(count, depth, -1)
            for low, high, left, right, outer in b:
                torch.bmm(product[..., low:high], outer[first : first + count], out=target[..., left:right])
        for back in places.back:
            y[: len(back)] += result.index_select(0, back)

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
