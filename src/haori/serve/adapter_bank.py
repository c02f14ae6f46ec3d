"""The adapters in memory, by layout, and where each one lies."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from haori.core.errors import MismatchError
from haori.serve.adapter_arena import AdapterArena, Layout, Site, layout_of
from haori.serve.adapter_weights import AdapterWeights

__all__ = ["ArenaBank"]

_MOST_SLOTS = 4096


class ArenaBank:
    """Adapters ready to be multiplied with, one arena for each layout.

    Args:
        sites: The linear sites of the model.
        vectors: Names of the norm weights that may be replaced.
        dtype: Of the factors.
        budget_bytes: Memory that adapters may take together; it bounds an arena's slots.
    """

    def __init__(self, sites: Sequence[Site], vectors: Collection[str], dtype: torch.dtype, budget_bytes: int) -> None:
        self._sites = sites
        self._vectors = frozenset(vectors)
        self._modules = frozenset(name for site in sites for name in site.modules)
        self._dtype = dtype
        self._budget = budget_bytes
        self._arenas: dict[Layout, AdapterArena] = {}
        self._arena_of: dict[str, AdapterArena] = {}
        self.token_rows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.version = 0  # counts changes of place, after which a plan no longer holds

    def size_of(self, weights: AdapterWeights) -> int:
        """Return the bytes that an adapter takes."""
        return layout_of(weights, self._sites).elements(self._sites) * self._dtype.itemsize

    def put(self, weights: AdapterWeights) -> None:
        """Give an adapter a slot.

        Raises:
            MismatchError: It changes something that is not applied here.
        """
        if weights.id in self._arena_of:
            return
        self.check(weights)
        layout = layout_of(weights, self._sites)
        arena = self._arenas.get(layout)
        if arena is None:
            size = max(layout.elements(self._sites) * self._dtype.itemsize, 1)
            slots = max(1, min(_MOST_SLOTS, self._budget // size + 1))
            arena = self._arenas[layout] = AdapterArena(layout, self._sites, slots, self._dtype)
        arena.put(weights)
        self._arena_of[weights.id] = arena
        if weights.token_rows:
            self.token_rows[weights.id] = {
                name: (ids, rows.to(self._dtype)) for name, (ids, rows) in weights.token_rows.items()
            }
        self.version += 1

    def check(self, weights: AdapterWeights) -> None:
        """Refuse an adapter that changes something which is not applied here.

        Raises:
            MismatchError: It does.
        """
        lost = sorted((set(weights.updates) - self._modules) | (set(weights.vectors) - self._vectors))
        if lost:
            raise MismatchError(
                f"The adapter {weights.id[:19]} changes {lost[0]!r}{' and others' if lost[1:] else ''}, which the "
                "engine cannot apply per request; merge it with `haori merge` and serve the merged model."
            )

    def drop(self, adapter: str) -> None:
        """Forget an adapter and give its memory back."""
        arena = self._arena_of.pop(adapter)
        self.token_rows.pop(adapter, None)
        arena.drop(arena.adapters.index(adapter))
        if not arena.adapters:
            del self._arenas[arena.layout]
        self.version += 1

    def place(self, adapter: str) -> tuple[AdapterArena, int]:
        """Return an adapter's arena and slot."""
        arena = self._arena_of[adapter]
        return arena, arena.adapters.index(adapter)
