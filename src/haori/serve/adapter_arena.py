"""Adapters of one layout in one block of memory, ready to be multiplied with as a batch.

A layout says what each linear site of the model has: the true rank of every module, a DoRA scale, a bias. A slot is one
stretch of memory with all that an adapter holds, in the order in which a step reads it; the factors of all slots at one
site are one tensor [slots, D, R], a view whose first stride is a slot. A site is a group of modules with the same input
(q, k and v; gate and up): their A factors stand side by side and make one product.
"""

import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haori.serve.adapter_weights import AdapterWeights

__all__ = ["READ_AHEAD", "AdapterArena", "Layout", "OuterFactor", "Site", "SiteFactors", "layout_of"]

READ_AHEAD = 64  # bytes behind a factor that a kernel may read, and ignores
_PAGE = mmap.PAGESIZE


class Site(NamedTuple):
    """Modules of the base that read the same input: names, input width, output widths."""

    modules: tuple[str, ...]
    width: int
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """What adapters of one kind hold. Two adapters share an arena if their layouts are equal.

    Attributes:
        ranks: For each site the rank of each of its modules; 0 where a module has no update.
        scaled: Sites with a DoRA scale.
        biased: Sites with a bias.
        vectors: Norm weights that are replaced: name and width.
    """

    ranks: tuple[tuple[int, ...], ...]
    scaled: tuple[bool, ...]
    biased: tuple[bool, ...]
    vectors: tuple[tuple[str, int], ...]

    def elements(self, sites: Sequence[Site]) -> int:
        """Return the numbers in one adapter of this layout."""
        return sum(math.prod(shape) for shape in _shapes(self, sites))


def layout_of(weights: AdapterWeights, sites: Sequence[Site]) -> Layout:
    """Return the layout of an adapter."""
    ranks, scaled, biased = [], [], []
    for site in sites:
        updates = [weights.updates.get(name) for name in site.modules]
        ranks.append(tuple(0 if u is None or u.a is None else int(u.a.shape[0]) for u in updates))
        scaled.append(any(u is not None and u.output_scale is not None for u in updates))
        biased.append(any(u is not None and u.bias is not None for u in updates))
    vectors = tuple(sorted((name, int(vector.numel())) for name, vector in weights.vectors.items()))
    return Layout(tuple(ranks), tuple(scaled), tuple(biased), vectors)


OuterFactor = tuple[int, int, int, int, Tensor]
"""B of one module in every slot: its ranks from, to, its outputs from, to, and the tensor [slots R out]."""


class SiteFactors(NamedTuple):
    """The factors of every slot at one site. R is the sum of the modules' ranks."""

    a: Tensor | None  # slots D R
    b: tuple[OuterFactor, ...]
    scale: Tensor | None  # slots out; less 1, for near 1 sixteen bits are coarse
    bias: Tensor | None  # slots out


class AdapterArena:
    """Slots for adapters of one layout; the slots in use have no gaps.

    Memory is asked for once, for `capacity` slots, in pages as large as the system has; it gives them as slots are
    written to, and takes them back when they are freed.

    Args:
        layout: Their layout.
        sites: The sites of the model, in the layout's order.
        capacity: Most slots.
        dtype: Of the factors.
    """

    def __init__(self, layout: Layout, sites: Sequence[Site], capacity: int, dtype: torch.dtype) -> None:
        self.layout = layout
        self.dtype = dtype
        self.capacity = capacity
        self._sites = sites
        shapes = list(_shapes(layout, sites))
        sizes = [math.prod(shape) for shape in shapes]
        self._slot = max(sum(sizes), 1)
        size = _pages(capacity * self._slot * dtype.itemsize + READ_AHEAD)
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, size, **flags)
        if hasattr(self._memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        slots = torch.frombuffer(self._memory, dtype=dtype, count=capacity * self._slot).view(capacity, self._slot)
        starts = itertools.accumulate(sizes[:-1], initial=0)
        self._tensors = [
            slots[:, start : start + size].view(capacity, *shape)
            for shape, size, start in zip(shapes, sizes, starts, strict=False)
        ]
        self._slots = slots
        self.adapters: list[str] = []
        self.factors: list[SiteFactors | None] = []
        self.vectors: dict[str, Tensor] = {}
        self._name()

    def put(self, weights: AdapterWeights) -> int:
        """Copy an adapter of this layout into a slot and return the slot's number."""
        slot = len(self.adapters)
        for target, source in zip(self._tensors, self._parts(weights), strict=True):
            place = target[slot]
            if source is None:
                place.zero_()
            else:
                place.copy_(source)
        self.adapters.append(weights.id)
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot: the last one moves there, and its memory goes back to the system."""
        last = len(self.adapters) - 1
        if slot != last:
            self._slots[slot] = self._slots[last]
            self.adapters[slot] = self.adapters[last]
        self.adapters.pop()
        if hasattr(self._memory, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            size = self._slot * self.dtype.itemsize
            first, stop = _pages(last * size), (last + 1) * size // _PAGE * _PAGE
            if stop > first:
                self._memory.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def _parts(self, weights: AdapterWeights) -> Iterator[Tensor | None]:
        """Yield what goes into each tensor of a slot; None for zeros."""
        for site, ranks, scaled, biased in _by_site(self.layout, self._sites):
            updates = [weights.updates.get(name) for name in site.modules]
            if any(ranks):
                yield torch.cat([u.a for u in updates if u is not None and u.a is not None]).T
            for update, rank in zip(updates, ranks, strict=True):
                if rank:
                    yield update.b if update is not None else None
            if scaled:
                yield _joined(
                    site, [None if u is None or u.output_scale is None else u.output_scale - 1.0 for u in updates]
                )
            if biased:
                yield _joined(site, [None if u is None else u.bias for u in updates])
        for name, _ in self.layout.vectors:
            yield weights.vectors[name]

    def _name(self) -> None:
        """Say which tensor is what."""
        tensors = iter(self._tensors)
        for site, ranks, scaled, biased in _by_site(self.layout, self._sites):
            a = next(tensors) if any(ranks) else None
            parts, start, column = [], 0, 0
            for rank, width in zip(ranks, site.outputs, strict=True):
                if rank:
                    parts.append((start, start + rank, column, column + width, next(tensors)))
                start, column = start + rank, column + width
            scale = next(tensors) if scaled else None
            bias = next(tensors) if biased else None
            used = a is not None or scaled or biased
            self.factors.append(SiteFactors(a, tuple(parts), scale, bias) if used else None)
        self.vectors = {name: next(tensors) for name, _ in self.layout.vectors}


def _by_site(layout: Layout, sites: Sequence[Site]) -> Iterator[tuple[Site, tuple[int, ...], bool, bool]]:
    return zip(sites, layout.ranks, layout.scaled, layout.biased, strict=True)


def _shapes(layout: Layout, sites: Sequence[Site]) -> Iterator[tuple[int, ...]]:
    """Yield the shape of each tensor of a slot: per site A, the B of each module, scale and bias; then norm weights."""
    for site, ranks, scaled, biased in _by_site(layout, sites):
        if any(ranks):
            yield site.width, sum(ranks)
        for rank, width in zip(ranks, site.outputs, strict=True):
            if rank:
                yield rank, width
        yield from [(sum(site.outputs),)] * (scaled + biased)
    for _, width in layout.vectors:
        yield (width,)


def _joined(site: Site, values: Sequence[Tensor | None]) -> Tensor:
    """Join vectors of a site's modules; zeros for those without."""
    zeros = [torch.zeros(width) for width in site.outputs]
    return torch.cat([zero if value is None else value for value, zero in zip(values, zeros, strict=True)])


def _pages(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // _PAGE) * _PAGE
