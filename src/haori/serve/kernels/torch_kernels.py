"""The operations between the large matrix products of a layer, in plain torch.

`NativeKernels` does the same in C, faster; the two are interchangeable, and a test compares them.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.adapters.packed import PackedAdapter, SiteLayout
from haori.serve.engine.kv_cache import Shelf

__all__ = [
    "HIDDEN",
    "ROWS_TOGETHER",
    "AdapterRows",
    "Angles",
    "AttentionShape",
    "AttentionStep",
    "Kernels",
    "PrefillChunk",
    "RowGroups",
    "ShelfStep",
    "TorchKernels",
    "norm",
    "rotate",
]

HIDDEN = -math.inf  # score of a masked position; no finite score can outweigh it
_SHORT = 512  # tokens up to which row by row in C beats batched products over whole chunks
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
    """The decoding rows of one shelf: which rows of the step, and their positions.

    Attributes:
        shelf: The shelf; its first rows are these, in this order.
        rows: Rows of the step.
        positions: Position of each row's new token in its sequence.
        numbers: 0, 1, 2 ... to the number of rows.
    """

    shelf: Shelf
    rows: slice
    positions: Tensor
    numbers: Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)


class PrefillChunk(NamedTuple):
    """A chunk of one prompt: its rows of the step, the row of its shelf, and its tokens' positions from, to."""

    shelf: Shelf
    shelf_row: int
    rows: slice
    start: int
    stop: int


@dataclass(frozen=True)
class AttentionStep:
    """What the rows of a step attend to: decoding rows by shelf, and prefill chunks."""

    shelves: tuple[ShelfStep, ...]
    chunks: tuple[PrefillChunk, ...]

    @cached_property
    def table(self) -> "RowTable":
        """Return decoding rows and short chunks row by row, for a kernel in C."""
        return row_table(self)

    @cached_property
    def masks(self) -> dict[int, Tensor]:
        """Masks of chunks that were made already, by first row."""
        return {}


@dataclass(frozen=True)
class RowTable:
    """Rows of a step, and where their sequences' keys and values are.

    Attributes:
        rows: Rows of the step [n].
        positions: Position of each row's token in its sequence [n].
        capacities: Tokens that the sequence's row of the cache has room for [n].
        keys: Address of its keys at each layer [layers, n].
        values: Address of its values.
        long_chunks: Chunks that are not in it.
    """

    rows: Tensor
    positions: Tensor
    capacities: Tensor
    keys: Tensor
    values: Tensor
    long_chunks: tuple[PrefillChunk, ...]


class AdapterRows(NamedTuple):
    """Rows of a step that one adapter acts on: the rows [n], and their strengths [n, 1] if not 1."""

    adapter: PackedAdapter
    rows: Tensor
    strengths: Tensor | None


@dataclass(frozen=True)
class RowGroups:
    """Which adapters of one layout act on which rows, by adapter and by row.

    Attributes:
        by_adapter: By adapter.
        rows: Rows, those under the same adapters side by side.
        groups: Up to `ROWS_TOGETHER` of them under the same adapters: group g is rows[groups[g] : groups[g + 1]].
        first: The adapters of group g are adapters[first[g] : first[g + 1]].
        adapters: Address of the memory of each group's adapters, one after the other.
        strengths: Strength of each of them on each row of its group, [len(adapters), ROWS_TOGETHER].
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
    """The operations between the matrix products.

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
        self, step: AttentionStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let all rows write their keys and values and attend; the result goes to `out` [N, H d]."""
        ...

    def update(self, groups: RowGroups, site: int, layout: SiteLayout, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of some rows to y."""
        ...


class TorchKernels:
    """The operations in plain torch, for every dtype and device."""

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
        self, step: AttentionStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        """Let all rows write their keys and values and attend; the result goes to `out` [N, H d]."""
        for shelf in step.shelves:
            self._attend_shelf(shelf, layer, qkv, angles, shape, out)
        for chunk in step.chunks:
            self.attend_chunk(chunk, step, layer, qkv, angles, shape, out)

    def attend_chunk(
        self, chunk: PrefillChunk, step: AttentionStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape,
        out: Tensor,
    ) -> None:  # fmt: skip
        """Let the rows of a chunk write their keys and values and attend."""
        rows, both = chunk.rows, shape.heads + shape.kv_heads
        split = qkv[rows].view(rows.stop - rows.start, -1, shape.width)
        turned = rotate(split[:, :both], angles, rows)
        keys, values = chunk.shelf.keys[layer][chunk.shelf_row], chunk.shelf.values[layer][chunk.shelf_row]  # Hkv T d
        keys[:, chunk.start : chunk.stop] = turned[:, shape.heads :].transpose(0, 1)
        values[:, chunk.start : chunk.stop] = split[:, both:].transpose(0, 1)
        queries = turned[:, : shape.heads].reshape(len(turned), shape.kv_heads, shape.groups, -1)
        queries = queries.permute(1, 2, 0, 3).flatten(1, 2)  # Hkv G*tokens d
        mask = step.masks.get(rows.start)
        if mask is None:
            mask = step.masks[rows.start] = _chunk_mask(chunk, shape, qkv)
        scores = torch.baddbmm(mask, queries, keys[:, : chunk.stop].transpose(1, 2), alpha=shape.scale)
        y = torch.bmm(torch.softmax(scores, -1), values[:, : chunk.stop])  # Hkv G*tokens d
        out[rows] = y.view(shape.kv_heads, shape.groups, -1, shape.width).permute(2, 0, 1, 3).flatten(1)

    def _attend_shelf(
        self, step: ShelfStep, layer: int, qkv: Tensor, angles: Angles, shape: AttentionShape, out: Tensor
    ) -> None:
        count, groups = step.count, shape.groups
        split = qkv[step.rows].view(count, -1, shape.width)
        turned = rotate(split[:, : shape.heads + shape.kv_heads], angles, step.rows)
        k_cache, v_cache = step.shelf.keys[layer], step.shelf.values[layer]
        k_cache[step.numbers, :, step.positions] = turned[:, shape.heads :]
        v_cache[step.numbers, :, step.positions] = split[:, shape.heads + shape.kv_heads :]
        k = k_cache[:count].flatten(0, 1).transpose(1, 2)  # count*Hkv d T
        v = v_cache[:count].flatten(0, 1)  # count*Hkv T d
        q = turned[:, : shape.heads].reshape(-1, groups, shape.width)  # count*Hkv G d
        scores = torch.baddbmm(self._mask(step, shape, qkv.dtype), q, k, alpha=shape.scale)
        out[step.rows] = torch.bmm(torch.softmax(scores, -1), v).view(count, -1)

    def update(self, groups: RowGroups, site: int, layout: SiteLayout, x: Tensor, y: Tensor) -> None:
        """Add the adapters' updates of some rows to y."""
        for adapter, rows, strengths in groups.by_adapter:
            factors = adapter.factors[site]
            if factors is None or factors.a is None:
                continue
            t = x.index_select(0, rows) @ factors.a  # n R
            if strengths is not None:
                t *= strengths
            for module, b in zip(layout.modules, factors.b, strict=True):
                y[:, module.left : module.right].index_add_(0, rows, t[:, module.low : module.high] @ b)

    def _mask(self, step: ShelfStep, shape: AttentionShape, dtype: torch.dtype) -> Tensor:
        capacity = step.shelf.capacity
        hidden = torch.arange(capacity, device=step.positions.device) > step.positions[:, None]  # count T
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)
        return mask[:, None, None].expand(-1, shape.kv_heads, shape.groups, -1).reshape(-1, shape.groups, capacity)


def _chunk_mask(chunk: PrefillChunk, shape: AttentionShape, like: Tensor) -> Tensor:
    """Return what is added to the scores of a chunk, [Hkv, G * tokens, stop]."""
    seen = torch.arange(chunk.start, chunk.stop, device=like.device)
    hidden = torch.arange(chunk.stop, device=like.device) > seen[:, None]  # tokens T
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, HIDDEN)
    return mask.repeat(shape.groups, 1).expand(shape.kv_heads, -1, -1)


def row_table(step: AttentionStep) -> RowTable:
    """Return the table of decoding rows and short chunks."""
    rows: list[int] = []
    positions: list[int] = []
    owners: list[tuple[Shelf, int, int]] = []  # shelf, row in it, how many rows of the step
    for shelf in step.shelves:
        rows += range(shelf.rows.start, shelf.rows.stop)
        positions += shelf.positions.tolist()
        owners += [(shelf.shelf, number, 1) for number in range(shelf.count)]
    short = [chunk for chunk in step.chunks if chunk.stop <= _SHORT]
    for chunk in short:
        rows += range(chunk.rows.start, chunk.rows.stop)
        positions += range(chunk.start, chunk.stop)
        owners.append((chunk.shelf, chunk.shelf_row, chunk.stop - chunk.start))
    counts = torch.tensor([count for *_, count in owners], dtype=torch.long)
    begins = torch.empty(2, 0, 0, dtype=torch.long)
    if owners:
        row_bytes = [row * shelf.row_bytes // (2 * shelf.shape.layers) for shelf, row, _ in owners]
        begins = torch.stack([shelf.addresses for shelf, *_ in owners], -1) + torch.tensor(row_bytes)
        begins = begins.repeat_interleave(counts, -1)  # keys or values, layers, n
    return RowTable(
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        capacities=torch.tensor([shelf.capacity for shelf, *_ in owners], dtype=torch.long).repeat_interleave(counts),
        keys=begins[0],
        values=begins[1],
        long_chunks=tuple(chunk for chunk in step.chunks if chunk.stop > _SHORT),
    )


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), with one weight or one for each row."""
    if weight.dim() == 1:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.rms_norm(x, x.shape[-1:], None, epsilon) * weight


def rotate(x: Tensor, angles: Angles, rows: slice) -> Tensor:
    """Turn [rows, heads, d] by the rotary angles of these rows of a step (arXiv 2104.09864); halves of d are pairs."""
    cosines, sines = (table[rows, None] for table in angles)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
