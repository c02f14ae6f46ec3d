"""Adapters in memory, laid out for multiplying: each one stretch of memory, in the order in which a step reads it.

A site is a group of modules with the same input (q, k and v; gate and up): their A factors stand side by side, (D, R)
with R the sum of the modules' true ranks, and make one product. Behind A come each module's B, then what DoRA and
biases need. Adapters of one layout hold everything at the same offsets, so one call of a kernel serves all of them.
"""

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from haori.core.errors import MismatchError
from haori.serve.adapters.reading import AdapterWeights

__all__ = [
    "Layout",
    "ModuleLayout",
    "PackedAdapter",
    "PackedBank",
    "Site",
    "SiteFactors",
    "SiteLayout",
    "memory_bytes",
]

_PAGE = mmap.PAGESIZE
_LARGE_PAGE = 2 << 20  # Linux gives large pages to memory that has a multiple of their size
_READ_AHEAD = 64  # bytes behind a factor that a kernel may read, and ignores


class _SpareMemory:
    """Gives memory to adapters, and keeps that of the last few evicted ones for the next.

    Memory comes in large pages where there are any: a step reads hundreds of megabytes of adapters once each, and with
    small pages, looking up where they are takes as long as reading them. A system, and more so a virtual machine, takes
    longer to provide new memory than copying an adapter into it takes.
    """

    _MOST = 2

    def __init__(self) -> None:
        self._kept: deque[mmap.mmap] = deque(maxlen=self._MOST)  # of the size asked for last; others go

    def take(self, size: int) -> mmap.mmap:
        """Return uninitialised memory of a size that `memory_bytes` gave."""
        with suppress(IndexError):
            while len(kept := self._kept.pop()) != size:
                pass
            return kept
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **flags)
        if size % _LARGE_PAGE == 0 and hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def give(self, memory: mmap.mmap) -> None:
        """Take back the memory of an adapter."""
        self._kept.append(memory)


class Site(NamedTuple):
    """Modules of the base that read the same input: names, input width, output widths."""

    modules: tuple[str, ...]
    width: int
    outputs: tuple[int, ...]


class ModuleLayout(NamedTuple):
    """B of one module: its ranks from, to, its outputs from, to, and where it begins."""

    low: int
    high: int
    left: int
    right: int
    start: int


@dataclass(frozen=True)
class SiteLayout:
    """Where an adapter's numbers for one site begin, counted in elements; None for what it does not have.

    Attributes:
        width: D.
        rank: R, the sum of the modules' ranks.
        outputs: Width of the output of all modules together.
        a: A, (D, R).
        modules: B of each module that has one, (its rank, its outputs).
        scale: DoRA's ratio less 1 (near 1, sixteen bits are coarse), (outputs).
        bias: What is added to the base's bias, (outputs).
    """

    width: int
    rank: int
    outputs: int
    a: int | None
    modules: tuple[ModuleLayout, ...]
    scale: int | None
    bias: int | None

    @cached_property
    def columns(self) -> Tensor:
        """Return [5, modules]: low, high, left, right and start of each module, where a kernel may read them."""
        return torch.tensor(self.modules, dtype=torch.int64).T.contiguous()

    @cached_property
    def bounds(self) -> tuple[int | None, ...]:
        """Return a kernel's arguments for the site: a, width, rank, number of modules, and addresses of the columns."""
        return (self.a, self.width, self.rank, len(self.modules), *(column.data_ptr() for column in self.columns))


class SiteFactors(NamedTuple):
    """An adapter's tensors for one site; see `SiteLayout`."""

    a: Tensor | None
    b: tuple[Tensor, ...]
    scale: Tensor | None
    bias: Tensor | None


class _Kind(NamedTuple):
    """What determines a layout: for each site the modules' ranks, whether it has a DoRA scale, a bias; norm weights."""

    ranks: tuple[tuple[int, ...], ...]
    scaled: tuple[bool, ...]
    biased: tuple[bool, ...]
    vectors: tuple[tuple[str, int], ...]


class Layout:
    """The memory layout of all adapters of one kind.

    Args:
        kind: What they hold.
        sites: The sites of the model.
    """

    def __init__(self, kind: _Kind, sites: Sequence[Site]) -> None:
        self._end = 0
        self.sites = tuple(self._site(*of) for of in zip(sites, *kind[:3], strict=True))
        self.vectors = {name: (self._take(width), width) for name, width in kind.vectors}
        self.elements = self._end

    def _take(self, count: int) -> int:
        start, self._end = self._end, self._end + count
        return start

    def _site(self, site: Site, ranks: tuple[int, ...], scaled: bool, biased: bool) -> SiteLayout | None:
        if not any(ranks) and not scaled and not biased:
            return None
        total, outputs = sum(ranks), sum(site.outputs)
        a = self._take(site.width * total) if total else None
        modules, low, left = [], 0, 0
        for rank, width in zip(ranks, site.outputs, strict=True):
            if rank:
                modules.append(ModuleLayout(low, low + rank, left, left + width, self._take(rank * width)))
            low, left = low + rank, left + width
        scale = self._take(outputs) if scaled else None
        bias = self._take(outputs) if biased else None
        return SiteLayout(site.width, total, outputs, a, tuple(modules), scale, bias)


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter ready to be multiplied with.

    Attributes:
        id: Its content id.
        layout: Where things are.
        memory: All of it, one dimension.
        token_rows: Ids and differences of rows of each embedding with trained tokens.
        head: A (R, D) and B (R, V) of the output head, if it is adapted.
    """

    id: str
    layout: Layout
    memory: Tensor
    token_rows: dict[str, tuple[Tensor, Tensor]]
    head: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> "PackedAdapter":
        """Return it on another device."""
        rows = {name: (ids.to(device), change.to(device)) for name, (ids, change) in self.token_rows.items()}
        head = None if self.head is None else (self.head[0].to(device), self.head[1].to(device))
        return PackedAdapter(self.id, self.layout, self.memory.to(device), rows, head)

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        rows = sum(ids.nbytes + change.nbytes for ids, change in self.token_rows.values())
        return memory_bytes(self.memory.nbytes) + rows + sum(factor.nbytes for factor in self.head or ())

    @cached_property
    def factors(self) -> tuple[SiteFactors | None, ...]:
        """Its tensors by site, views of its memory."""
        return tuple(None if layout is None else self._factors(layout) for layout in self.layout.sites)

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """Differences of norm weights by name, views of its memory."""
        return {name: self._view(start, width) for name, (start, width) in self.layout.vectors.items()}

    def _factors(self, layout: SiteLayout) -> SiteFactors:
        return SiteFactors(
            None if layout.a is None else self._view(layout.a, layout.width, layout.rank),
            tuple(self._view(m.start, m.high - m.low, m.right - m.left) for m in layout.modules),
            None if layout.scale is None else self._view(layout.scale, layout.outputs),
            None if layout.bias is None else self._view(layout.bias, layout.outputs),
        )

    def _view(self, start: int, *shape: int) -> Tensor:
        return self.memory[start : start + math.prod(shape)].view(shape)


class PackedBank:
    """The adapters in memory.

    Args:
        sites: The linear sites of the model.
        vectors: Names of the norm weights that may be replaced.
        tables: Names of the parameters whose rows may be changed.
        dtype: Of the factors.
        device: Where they are multiplied with.
        head: Name of the output head, if it takes low-rank updates.

    Attributes:
        held: By content id.
        token_rows: Those of the adapters that have any, by content id.
        heads: Factors of the head, of the adapters that have any, by content id.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        vectors: Collection[str],
        tables: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
        head: str | None = None,
    ) -> None:
        self._sites, self._head = sites, head
        modules = [name for site in sites for name in site.modules]
        self._changeable = frozenset([*modules, *([] if head is None else [head])]).union(vectors, tables)
        self._dtype = dtype
        self._device = device
        self._layouts: weakref.WeakValueDictionary[_Kind, Layout] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._spare = _SpareMemory()
        self.held: dict[str, PackedAdapter] = {}
        self.token_rows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.heads: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, weights: AdapterWeights) -> PackedAdapter:
        """Lay an adapter out; may be called on any thread.

        Raises:
            MismatchError: It changes something that is not applied here.
        """
        lost = sorted({*weights.updates, *weights.vectors, *weights.token_rows} - self._changeable)
        update = weights.updates.get(self._head or "")
        if update is not None and (update.output_scale is not None or update.bias is not None):
            lost.append(f"scale or bias of {self._head}")
        if lost:
            raise MismatchError(
                f"The adapter {weights.id[:19]} changes {lost[0]!r}{' and others' if lost[1:] else ''}, which the "
                "engine cannot apply per request; merge it with `haori merge` and serve the merged model."
            )
        packed = self._packed(weights, self._layout(_kind(weights, self._sites)))
        return packed if self._device.type == "cpu" else packed.to(self._device)

    def put(self, adapter: PackedAdapter) -> None:
        """Keep an adapter."""
        self.held[adapter.id] = adapter
        if adapter.token_rows:
            self.token_rows[adapter.id] = adapter.token_rows
        if adapter.head is not None:
            self.heads[adapter.id] = adapter.head

    def drop(self, adapter: str) -> None:
        """Forget an adapter; its memory is kept for another once nobody refers to it."""
        del self.held[adapter]
        self.token_rows.pop(adapter, None)
        self.heads.pop(adapter, None)

    def _layout(self, kind: _Kind) -> Layout:
        """Return the layout that all adapters of a kind share, for as long as there is one."""
        with self._lock:
            layout = self._layouts.get(kind)
            if layout is None:
                layout = self._layouts[kind] = Layout(kind, self._sites)
            return layout

    def _packed(self, weights: AdapterWeights, layout: Layout) -> PackedAdapter:
        rows = {name: (ids, change.to(self._dtype)) for name, (ids, change) in weights.token_rows.items()}
        memory = self._spare.take(memory_bytes(layout.elements * self._dtype.itemsize))
        count = layout.elements
        numbers = torch.frombuffer(memory, dtype=self._dtype, count=max(count, 1))[:count]
        packed = PackedAdapter(weights.id, layout, numbers, rows, self._head_of(weights))
        weakref.finalize(packed, self._spare.give, memory).atexit = False
        for site, factors in zip(self._sites, packed.factors, strict=True):
            if factors is not None:
                for target, source in zip(_targets(factors), _sources(weights, site, factors), strict=True):
                    target.copy_(source)
        for name, vector in packed.vectors.items():
            vector.copy_(weights.vectors[name])
        return packed

    def _head_of(self, weights: AdapterWeights) -> tuple[Tensor, Tensor] | None:
        update = weights.updates.get(self._head or "")
        if update is None or update.a is None or update.b is None:
            return None
        return update.a.to(self._dtype), update.b.to(self._dtype)


def _kind(weights: AdapterWeights, sites: Sequence[Site]) -> _Kind:
    ranks, scaled, biased = [], [], []
    for site in sites:
        updates = [weights.updates.get(name) for name in site.modules]
        ranks.append(tuple(0 if u is None or u.a is None else int(u.a.shape[0]) for u in updates))
        scaled.append(any(u is not None and u.output_scale is not None for u in updates))
        biased.append(any(u is not None and u.bias is not None for u in updates))
    vectors = tuple(sorted((name, int(vector.numel())) for name, vector in weights.vectors.items()))
    return _Kind(tuple(ranks), tuple(scaled), tuple(biased), vectors)


def memory_bytes(size: int) -> int:
    """Return the memory that so many bytes take: whole pages, large ones unless more than a quarter would be empty."""
    needed = size + _READ_AHEAD
    large = -(-needed // _LARGE_PAGE) * _LARGE_PAGE
    return large if large <= 1.25 * needed else -(-needed // _PAGE) * _PAGE


def _targets(factors: SiteFactors) -> Iterator[Tensor]:
    for tensor in (factors.a, *factors.b, factors.scale, factors.bias):
        if tensor is not None:
            yield tensor


def _sources(weights: AdapterWeights, site: Site, factors: SiteFactors) -> Iterator[Tensor]:
    """Yield what goes into each tensor of a site."""
    updates = [weights.updates.get(name) for name in site.modules]
    low_rank = [u for u in updates if u is not None and u.a is not None and u.b is not None]
    if factors.a is not None:
        yield torch.cat([u.a for u in low_rank if u.a is not None]).T
    yield from (u.b for u in low_rank if u.b is not None)
    if factors.scale is not None:
        yield _joined(site, [None if u is None or u.output_scale is None else u.output_scale - 1.0 for u in updates])
    if factors.bias is not None:
        yield _joined(site, [None if u is None else u.bias for u in updates])


def _joined(site: Site, values: Sequence[Tensor | None]) -> Tensor:
    """Join vectors of a site's modules; zeros for those without."""
    zeros = [torch.zeros(width) for width in site.outputs]
    return torch.cat([zero if value is None else value for value, zero in zip(values, zeros, strict=True)])
