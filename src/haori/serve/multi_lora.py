"""Many adapters in one batch: every row of a step gets the updates of its own mix.

    y[i] = (W x[i]) * (1 + sum_j c_ij (m_j - 1)) + bias + sum_j c_ij (x[i] A_j B_j + bias_j)

with c_ij the strength of adapter j on row i, A_j D R and B_j R out (scale and DoRA ratio m_j are multiplied into B_j).
Rows of the bare base have no j. A decoding row brings one x to each of its adapters, so x is gathered by adapter, and
one batched product over a range of slots serves all adapters in it (S-LoRA, arXiv 2311.03285, and Punica, arXiv
2310.18547, do so with kernels of their own; here a slot range of an arena is a plain view, and torch's product does).
A chunk of a prompt is a range of rows under one mix and multiplies the factors directly.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.serve.adapter_arena import AdapterArena, OuterFactor, SiteFactors
from haori.serve.adapter_bank import ArenaBank
from haori.serve.request import AdapterMix
from haori.serve.weight import Weight

__all__ = ["StepPlan", "plan_step"]

_CHUNK = 8  # a run of so many rows multiplies the factors directly
_MOST_RANGES = 6


@dataclass(frozen=True)
class _Range:
    """Slots that one batched product covers: `count` from `first`, each with `depth` places for rows."""

    first: int
    count: int
    depth: int
    offset: int  # of its first place among all places


class _Part(NamedTuple):
    """One adapter acting on one row, or on a range of rows."""

    slot: int
    strength: float
    start: int
    stop: int


@dataclass(frozen=True)
class _ArenaPlan:
    """How the rows of a step meet the adapters of one arena.

    `rows` says which row stands at each place; `back[k]` at which place each row finds its k-th update (the place
    behind the last one holds zeros). `places` is their number without it.
    """

    arena: AdapterArena
    ranges: tuple[_Range, ...]
    rows: Tensor
    strengths: Tensor | None
    back: tuple[Tensor, ...]
    places: int
    chunks: tuple[_Part, ...]
    parts: tuple[_Part, ...]

    def update(self, factors: SiteFactors, x: Tensor, y: Tensor) -> None:
        """Add the updates of this arena's adapters to y (N out), for x (N D)."""
        if factors.a is not None:
            if self.places:
                self._update_gathered(factors.a, factors.b, x, y)
            for part in self.chunks:
                t = x[part.start : part.stop] @ factors.a[part.slot]  # rows R
                if part.strength != 1.0:
                    t *= part.strength
                for low, high, left, right, b in factors.b:
                    y[part.start : part.stop, left:right].addmm_(t[:, low:high], b[part.slot])
        if factors.bias is not None:
            for part in self.parts:
                y[part.start : part.stop] += part.strength * factors.bias[part.slot]

    def rescale(self, scale: Tensor, factor: Tensor) -> None:
        """Add c (m - 1) to the factor (N out) of each row."""
        for part in self.parts:
            factor[part.start : part.stop] += part.strength * scale[part.slot].float()

    def _update_gathered(self, a: Tensor, bs: Sequence[OuterFactor], x: Tensor, y: Tensor) -> None:
        inner = x.index_select(0, self.rows)  # places D
        t = x.new_empty(self.places, a.shape[2])
        full = sum(right - left for _, _, left, right, _ in bs) == y.shape[1]
        update = (x.new_empty if full else x.new_zeros)((self.places + 1, y.shape[1]))
        update[-1] = 0.0
        for r in self.ranges:
            first, count, depth = r.first, r.count, r.depth
            span = slice(r.offset, r.offset + count * depth)
            product = t[span].view(count, depth, -1)
            torch.bmm(inner[span].view(count, depth, -1), a[first : first + count], out=product)
            if self.strengths is not None:
                product *= self.strengths[span].view(count, depth, 1)
            target = update[span].view(count, depth, -1)
            for low, high, left, right, b in bs:
                torch.bmm(product[..., low:high], b[first : first + count], out=target[..., left:right])
        for back in self.back:
            y[: len(back)] += update.index_select(0, back)


@dataclass(frozen=True)
class StepPlan:
    """How the rows of one step meet their adapters; empty when all are of the bare base."""

    arenas: tuple[_ArenaPlan, ...] = ()

    def linear(self, site: int, weight: Weight, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return y (N out) for x (N D): the base's product with every row's own updates."""
        y = weight(x)
        used = [(plan, factors) for plan in self.arenas if (factors := plan.arena.factors[site]) is not None]
        if any(factors.scale is not None for _, factors in used):
            factor = torch.ones_like(y, dtype=torch.float32)
            for plan, factors in used:
                if factors.scale is not None:
                    plan.rescale(factors.scale, factor)
            y = (y * factor).to(y.dtype)
        if bias is not None:
            y += bias
        for plan, factors in used:
            plan.update(factors, x, y)
        return y

    def vector(self, name: str, base: Tensor, rows: int) -> Tensor:
        """Return a norm's weight: the base's (D), or one for each of the N rows (N D)."""
        changed: Tensor | None = None
        for plan in self.arenas:
            if name in plan.arena.vectors:
                changed = base.repeat(rows, 1) if changed is None else changed
                for part in plan.parts:
                    changed[part.start : part.stop] += part.strength * plan.arena.vectors[name][part.slot]
        return base if changed is None else changed


def plan_step(mixes: Sequence[AdapterMix], lengths: Sequence[int], bank: ArenaBank, device: torch.device) -> StepPlan:
    """Plan a step.

    Args:
        mixes: Mix of each run of rows, in order.
        lengths: Number of rows of each run.
        bank: Where the adapters lie.
        device: Where indices are needed.
    """
    bank.gather({adapter for mix in mixes for adapter, _ in mix})
    parts: dict[int, tuple[AdapterArena, list[_Part]]] = {}
    start = 0
    for mix, length in zip(mixes, lengths, strict=True):
        for adapter, strength in mix:
            arena, slot = bank.place(adapter)
            parts.setdefault(id(arena), (arena, []))[1].append(_Part(slot, strength, start, start + length))
        start += length
    return StepPlan(tuple(_plan_arena(arena, found, device) for arena, found in parts.values()))


def _plan_arena(arena: AdapterArena, parts: Sequence[_Part], device: torch.device) -> _ArenaPlan:
    chunks = tuple(part for part in parts if part.stop - part.start >= _CHUNK)
    single = [(part, row) for part in parts if part.stop - part.start < _CHUNK for row in range(part.start, part.stop)]
    depth = Counter(part.slot for part, _ in single)
    ranges = _ranges(depth)
    places = sum(r.count * r.depth for r in ranges)
    free = {r.first + i: iter(range(r.offset + i * r.depth, r.offset + (i + 1) * r.depth))
            for r in ranges for i in range(r.count)}  # fmt: skip
    rows, strengths = [0] * places, [1.0] * places
    found: dict[int, list[int]] = {}
    for part, row in single:
        place = next(free[part.slot])
        rows[place], strengths[place] = row, part.strength
        found.setdefault(row, []).append(place)
    reach = max(found, default=-1) + 1
    back = [
        [found[row][k] if row in found and k < len(found[row]) else places for row in range(reach)]
        for k in range(max(map(len, found.values()), default=0))
    ]
    return _ArenaPlan(
        arena=arena,
        ranges=ranges,
        rows=torch.tensor(rows, device=device),
        strengths=None
        if all(s == 1.0 for s in strengths)
        else torch.tensor(strengths, device=device, dtype=arena.dtype),
        back=tuple(torch.tensor(places, device=device) for places in back),
        places=places,
        chunks=chunks,
        parts=tuple(parts),
    )


def _ranges(depth: Counter[int]) -> tuple[_Range, ...]:
    """Divide the slots in use into ranges, so that few places stay empty: a hot adapter gets a range of its own."""
    whole = [sorted(depth)] if depth else []
    while len(whole) < _MOST_RANGES:
        waste = [_waste(slots, depth) for slots in whole]
        worst = max(range(len(whole)), key=waste.__getitem__, default=None)
        if worst is None or waste[worst] <= 0:
            break
        slots = whole.pop(worst)
        hot = max(range(len(slots)), key=lambda i: depth[slots[i]])
        whole[worst:worst] = [part for part in (slots[:hot], slots[hot : hot + 1], slots[hot + 1 :]) if part]
    ranges, offset = [], 0
    for slots in whole:
        count, most = slots[-1] - slots[0] + 1, max(depth[slot] for slot in slots)
        ranges.append(_Range(slots[0], count, most, offset))
        offset += count * most
    return tuple(ranges)


def _waste(slots: Sequence[int], depth: Counter[int]) -> int:
    """Return how many places too many a range over these slots would have; up to as many as are used are allowed."""
    used = sum(depth[slot] for slot in slots)
    return (slots[-1] - slots[0] + 1) * max(depth[slot] for slot in slots) - 2 * used - 16
