"""Many adapters in one batch: every row of a step gets the updates of its own mix.

    y[i] = (W x[i]) * (1 + sum_j c_ij (m_j - 1)) + bias + sum_j c_ij (x[i] A_j B_j + bias_j)

with c_ij the strength of adapter j on row i, A_j D R and B_j R out (scale and DoRA ratio m_j are multiplied into B_j).
Rows of the bare base have no j. Rows are gathered by adapter, so that each factor is read once, however many rows wear
it (S-LoRA, arXiv 2311.03285; Punica, arXiv 2310.18547). A long chunk of a prompt multiplies the factors directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.serve.adapter_arena import AdapterArena, SiteFactors
from haori.serve.adapter_bank import ArenaBank
from haori.serve.kernels import ROWS_TOGETHER, Kernels, Places, SlotRows
from haori.serve.request import AdapterMix
from haori.serve.weight import Weight

__all__ = ["StepPlan", "plan_step"]


class _Part(NamedTuple):
    """One adapter acting on one row, or on a range of rows."""

    slot: int
    strength: float
    start: int
    stop: int


@dataclass(frozen=True)
class _ArenaPlan:
    """How the rows of a step meet the adapters of one arena: few by `places`, long chunks of prompts as they are."""

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
        if not self.arenas:
            return y if bias is None else y + bias
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
    parts: dict[int, tuple[AdapterArena, list[_Part]]] = {}
    start = 0
    for mix, length in zip(mixes, lengths, strict=True):
        for adapter, strength in mix:
            arena, slot = bank.place(adapter)
            parts.setdefault(id(arena), (arena, []))[1].append(_Part(slot, strength, start, start + length))
        start += length
    plans = (_plan_arena(arena, found, kernels.longest, device) for arena, found in parts.values())
    return StepPlan(kernels, tuple(plans))


def _plan_arena(arena: AdapterArena, parts: Sequence[_Part], longest: int, device: torch.device) -> _ArenaPlan:
    short = [part for part in parts if part.stop - part.start <= longest]
    return _ArenaPlan(
        arena=arena,
        places=_places(short, arena.dtype, device) if short else None,
        chunks=tuple(part for part in parts if part.stop - part.start > longest),
        parts=tuple(parts),
    )


def _places(parts: Sequence[_Part], dtype: torch.dtype, device: torch.device) -> Places:
    """Arrange rows by adapter, and by row."""
    by_row: dict[int, list[_Part]] = {}
    by_slot: dict[int, list[tuple[int, float]]] = {}
    for part in parts:
        for row in range(part.start, part.stop):
            by_row.setdefault(row, []).append(part)
            by_slot.setdefault(part.slot, []).append((row, part.strength))
    together: dict[tuple[int, ...], list[int]] = {}
    for row, own in by_row.items():
        own.sort()
        together.setdefault(tuple(part.slot for part in own), []).append(row)
    rows: list[int] = []
    groups, first = [0], [0]
    slots: list[int] = []
    strengths: list[list[float]] = []
    for shared, alike in together.items():
        for start in range(0, len(alike), ROWS_TOGETHER):
            group = alike[start : start + ROWS_TOGETHER]
            rows += group
            slots += shared
            for number in range(len(shared)):
                strengths.append([by_row[row][number].strength for row in group] + [0.0] * (ROWS_TOGETHER - len(group)))
            groups.append(len(rows))
            first.append(len(slots))
    return Places(
        by_slot=tuple(_slot_rows(slot, found, dtype, device) for slot, found in by_slot.items()),
        rows=torch.tensor(rows, device=device),
        groups=torch.tensor(groups, device=device),
        first=torch.tensor(first, device=device),
        slots=torch.tensor(slots, device=device),
        strengths=torch.tensor(strengths, device=device, dtype=torch.float32),
    )


def _slot_rows(slot: int, found: Sequence[tuple[int, float]], dtype: torch.dtype, device: torch.device) -> SlotRows:
    rows, strengths = zip(*found, strict=True)
    plain = all(strength == 1.0 for strength in strengths)
    column = None if plain else torch.tensor(strengths, device=device, dtype=dtype)[:, None]
    return SlotRows(slot, torch.tensor(rows, device=device), column)
