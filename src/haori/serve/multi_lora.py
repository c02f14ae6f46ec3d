"""Many adapters in one batch: every row of a step gets the updates of its own mix.

    y[i] = (W x[i]) * (1 + sum_j c_ij (m_j - 1)) + bias + sum_j c_ij (x[i] A_j B_j + bias_j)

with c_ij the strength of adapter j on row i, A_j D R and B_j R out (scale and DoRA ratio m_j are multiplied into B_j).
Rows of the bare base have no j. A decoding row brings one x to each of its adapters, so x is gathered by adapter, and
one batched product over a range of slots serves all adapters in it (S-LoRA, arXiv 2311.03285, and Punica, arXiv
2310.18547, do so with kernels of their own; here a slot range of an arena is a plain view, and torch's product does).
A chunk of a prompt is a range of rows under one mix and multiplies the factors directly.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.serve.adapter_arena import AdapterArena, SiteFactors
from haori.serve.adapter_bank import ArenaBank
from haori.serve.kernels import Kernels, Places
from haori.serve.request import AdapterMix
from haori.serve.weight import Weight

__all__ = ["StepPlan", "plan_step"]

_CHUNK = 8  # a run of so many rows multiplies the factors directly
_MOST_RANGES = 6


class _Part(NamedTuple):
    """One adapter acting on one row, or on a range of rows."""

    slot: int
    strength: float
    start: int
    stop: int


@dataclass(frozen=True)
class _ArenaPlan:
    """How the rows of a step meet the adapters of one arena: single rows by `places`, chunks of prompts as they are."""

    arena: AdapterArena
    places: Places | None
    chunks: tuple[_Part, ...]
    parts: tuple[_Part, ...]

    def update(self, kernels: Kernels, factors: SiteFactors, x: Tensor, y: Tensor) -> None:
        """Add the updates of this arena's adapters to y (N out), for x (N D)."""
        if factors.a is not None:
            if self.places is not None:
                kernels.update(self.places, factors.a, factors.b, x, y)
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


@dataclass(frozen=True)
class StepPlan:
    """How the rows of one step meet their adapters; empty when all are of the bare base."""

    kernels: Kernels
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
            plan.update(self.kernels, factors, x, y)
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


def plan_step(
    mixes: Sequence[AdapterMix], lengths: Sequence[int], bank: ArenaBank, kernels: Kernels, device: torch.device
) -> StepPlan:
    """Plan a step.

    Args:
        mixes: Mix of each run of rows, in order.
        lengths: Number of rows of each run.
        bank: Where the adapters lie.
        kernels: Compute the updates of single rows.
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
    return StepPlan(kernels, tuple(_plan_arena(arena, found, device) for arena, found in parts.values()))


def _plan_arena(arena: AdapterArena, parts: Sequence[_Part], device: torch.device) -> _ArenaPlan:
    single = [part for part in parts if part.stop - part.start < _CHUNK]
    return _ArenaPlan(
        arena=arena,
        places=_places(single, arena.dtype, device) if single else None,
        chunks=tuple(part for part in parts if part.stop - part.start >= _CHUNK),
        parts=tuple(parts),
    )


def _places(parts: Sequence[_Part], dtype: torch.dtype, device: torch.device) -> Places:
    """Arrange single rows both by row and by slot."""
    by_row: dict[int, list[_Part]] = {}
    for part in parts:
        for row in range(part.start, part.stop):
            by_row.setdefault(row, []).append(part)
    in_order = [part for row in sorted(by_row) for part in by_row[row]]
    ranges = _ranges(Counter(part.slot for part in in_order))
    free = {
        first + i: iter(range(offset + i * depth, offset + (i + 1) * depth))
        for first, count, depth, offset in ranges
        for i in range(count)
    }
    total = sum(count * depth for _, count, depth, _ in ranges)
    gather, strengths = [0] * total, [1.0] * total
    found: dict[int, list[int]] = {row: [] for row in by_row}
    for row in sorted(by_row):
        for part in by_row[row]:
            place = next(free[part.slot])
            gather[place], strengths[place] = row, part.strength
            found[row].append(place)
    back = [
        [found[row][k] if row in found and k < len(found[row]) else total for row in range(max(found) + 1)]
        for k in range(max(map(len, found.values())))
    ]
    plain = all(strength == 1.0 for strength in strengths)
    return Places(
        rows=torch.tensor(sorted(by_row), device=device),
        first=torch.tensor([0, *itertools.accumulate(len(by_row[row]) for row in sorted(by_row))], device=device),
        slots=torch.tensor([part.slot for part in in_order], device=device),
        strengths=torch.tensor([part.strength for part in in_order], device=device, dtype=torch.float32),
        ranges=ranges,
        gather=torch.tensor(gather, device=device),
        gathered_strengths=None if plain else torch.tensor(strengths, device=device, dtype=dtype),
        back=tuple(torch.tensor(places, device=device) for places in back),
    )


def _ranges(depth: Counter[int]) -> tuple[tuple[int, int, int, int], ...]:
    """Divide the slots in use into ranges, so that few places stay empty: a hot adapter gets a range of its own.

    Returns:
        For each range its first slot, the number of slots, of places for rows in each, and its first place.
    """
    whole = [sorted(depth)]
    while len(whole) < _MOST_RANGES:
        waste = [_waste(slots, depth) for slots in whole]
        worst = max(range(len(whole)), key=waste.__getitem__)
        if waste[worst] <= 0:
            break
        slots = whole.pop(worst)
        hot = max(range(len(slots)), key=lambda i: depth[slots[i]])
        whole[worst:worst] = [part for part in (slots[:hot], slots[hot : hot + 1], slots[hot + 1 :]) if part]
    ranges, offset = [], 0
    for slots in whole:
        count, most = slots[-1] - slots[0] + 1, max(depth[slot] for slot in slots)
        ranges.append((slots[0], count, most, offset))
        offset += count * most
    return tuple(ranges)


def _waste(slots: Sequence[int], depth: Counter[int]) -> int:
    """Return how many places too many a range over these slots would have; up to as many as are used are allowed."""
    used = sum(depth[slot] for slot in slots)
    return (slots[-1] - slots[0] + 1) * max(depth[slot] for slot in slots) - 2 * used - 16
