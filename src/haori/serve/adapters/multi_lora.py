"""Many adapters in one batch: every row of a step gets the updates of its own mix.

    y[i] = (W x[i]) * (1 + sum_j c_ij (m_j - 1)) + bias + sum_j c_ij (x[i] A_j B_j + bias_j)

with c_ij the strength of adapter j on row i, A_j D R and B_j R out (scale and DoRA ratio m_j are multiplied into B_j).
Rows of the bare base have no j. Rows are gathered by adapter, so that each factor is read once, however many rows use
it (S-LoRA, arXiv 2311.03285; Punica, arXiv 2310.18547). A long prefill chunk multiplies the factors directly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.serve.adapters.packed import Layout, PackedAdapter, SiteFactors, SiteLayout
from haori.serve.kernels.torch_kernels import ROWS_TOGETHER, AdapterRows, Kernels, RowGroups
from haori.serve.models.weight import Weight
from haori.serve.request import AdapterMix

__all__ = ["StepPlan", "plan_step"]


class _Span(NamedTuple):
    """One adapter acting on one row, or on a range of rows."""

    adapter: PackedAdapter
    strength: float
    start: int
    stop: int


@dataclass(frozen=True)
class _LayoutPlan:
    """Which rows of a step use which adapters of one layout: short runs in `groups`, long prefill chunks directly."""

    layout: Layout
    groups: RowGroups | None
    chunks: tuple[_Span, ...]
    parts: tuple[_Span, ...]

    def update(self, kernels: Kernels, site: int, layout: SiteLayout, x: Tensor, y: Tensor) -> None:
        """Add the updates of these adapters to y (N out), for x (N D)."""
        if layout.a is not None:
            if self.groups is not None:
                kernels.update(self.groups, site, layout, x, y)
            for adapter, strength, start, stop in self.chunks:
                factors = _factors(adapter, site)
                assert factors.a is not None
                t = x[start:stop] @ factors.a  # rows R
                if strength != 1.0:
                    t *= strength
                for module, b in zip(layout.modules, factors.b, strict=True):
                    y[start:stop, module.left : module.right].addmm_(t[:, module.low : module.high], b)
        if layout.bias is not None:
            for adapter, strength, start, stop in self.parts:
                bias = _factors(adapter, site).bias
                assert bias is not None
                y[start:stop] += strength * bias

    def rescale(self, site: int, factor: Tensor) -> None:
        """Add c (m - 1) to the factor (N out) of each row."""
        for adapter, strength, start, stop in self.parts:
            scale = _factors(adapter, site).scale
            assert scale is not None
            factor[start:stop] += strength * scale.float()


def _factors(adapter: PackedAdapter, site: int) -> SiteFactors:
    found = adapter.factors[site]
    assert found is not None
    return found


@dataclass(frozen=True)
class StepPlan:
    """Which rows of one step use which adapters; empty when all are of the bare base."""

    kernels: Kernels
    layouts: tuple[_LayoutPlan, ...] = ()

    def linear(self, site: int, weight: Weight, bias: Tensor | None, x: Tensor) -> Tensor:
        """Return y (N out) for x (N D): the base's product with every row's own updates."""
        y = weight(x)
        if not self.layouts:
            return y if bias is None else y + bias
        used = [(plan, layout) for plan in self.layouts if (layout := plan.layout.sites[site]) is not None]
        if any(layout.scale is not None for _, layout in used):
            factor = torch.ones_like(y, dtype=torch.float32)
            for plan, layout in used:
                if layout.scale is not None:
                    plan.rescale(site, factor)
            y = (y * factor).to(y.dtype)
        if bias is not None:
            y += bias
        for plan, layout in used:
            plan.update(self.kernels, site, layout, x, y)
        return y

    def vector(self, name: str, base: Tensor, rows: int) -> Tensor:
        """Return a norm's weight: the base's (D), or one for each of the N rows (N D)."""
        changed: Tensor | None = None
        for plan in self.layouts:
            if name in plan.layout.vectors:
                changed = base.repeat(rows, 1) if changed is None else changed
                for adapter, strength, start, stop in plan.parts:
                    changed[start:stop] += strength * adapter.vectors[name]
        return base if changed is None else changed


def plan_step(
    mixes: Sequence[AdapterMix],
    lengths: Sequence[int],
    adapters: Mapping[str, PackedAdapter],
    kernels: Kernels,
    device: torch.device,
) -> StepPlan:
    """Plan a step.

    Args:
        mixes: Mix of each run of rows, in order.
        lengths: Number of rows of each run.
        adapters: The adapters in memory.
        kernels: Compute the updates of few rows.
        device: Where indices are needed.
    """
    parts: dict[int, list[_Span]] = {}
    start = 0
    for mix, length in zip(mixes, lengths, strict=True):
        for name, strength in mix:
            adapter = adapters[name]
            parts.setdefault(id(adapter.layout), []).append(_Span(adapter, strength, start, start + length))
        start += length
    return StepPlan(kernels, tuple(_plan_layout(found, kernels.longest, device) for found in parts.values()))


def _plan_layout(parts: Sequence[_Span], longest: int, device: torch.device) -> _LayoutPlan:
    short = [part for part in parts if part.stop - part.start <= longest]
    return _LayoutPlan(
        layout=parts[0].adapter.layout,
        groups=_group_rows(short, device) if short else None,
        chunks=tuple(part for part in parts if part.stop - part.start > longest),
        parts=tuple(parts),
    )


def _group_rows(parts: Sequence[_Span], device: torch.device) -> RowGroups:
    """Group rows by adapter, and by the adapters that they share."""
    by_row: dict[int, list[_Span]] = {}
    by_adapter: dict[int, list[tuple[_Span, int]]] = {}
    for part in parts:
        for row in range(part.start, part.stop):
            by_row.setdefault(row, []).append(part)
            by_adapter.setdefault(id(part.adapter), []).append((part, row))
    together: dict[tuple[int, ...], list[int]] = {}
    for row, own in by_row.items():
        own.sort(key=lambda part: part.adapter.id)
        together.setdefault(tuple(id(part.adapter) for part in own), []).append(row)
    rows: list[int] = []
    groups, first = [0], [0]
    addresses: list[int] = []
    strengths: list[list[float]] = []
    for alike in together.values():
        for start in range(0, len(alike), ROWS_TOGETHER):
            group = alike[start : start + ROWS_TOGETHER]
            rows += group
            for number, part in enumerate(by_row[group[0]]):
                addresses.append(part.adapter.memory.data_ptr())
                strengths.append([by_row[row][number].strength for row in group] + [0.0] * (ROWS_TOGETHER - len(group)))
            groups.append(len(rows))
            first.append(len(addresses))
    return RowGroups(
        by_adapter=tuple(_adapter_rows(found, device) for found in by_adapter.values()),
        rows=torch.tensor(rows, device=device),
        groups=torch.tensor(groups, device=device),
        first=torch.tensor(first, device=device),
        adapters=torch.tensor(addresses, device=device),
        strengths=torch.tensor(strengths, device=device, dtype=torch.float32),
    )


def _adapter_rows(found: Sequence[tuple[_Span, int]], device: torch.device) -> AdapterRows:
    adapter = found[0][0].adapter
    strengths = [part.strength for part, _ in found]
    plain = all(strength == 1.0 for strength in strengths)
    column = None if plain else torch.tensor(strengths, device=device, dtype=adapter.memory.dtype)[:, None]
    return AdapterRows(adapter, torch.tensor([row for _, row in found], device=device), column)
