"""The adapters in memory."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from haori.core.errors import MismatchError
from haori.serve.adapters.packed import Layouts, PackedAdapter, Site, SpareMemory, pack_adapter
from haori.serve.adapters.weights import AdapterWeights

__all__ = ["PackedBank"]


class PackedBank:
    """Adapters ready to be multiplied with.

    Args:
        sites: The linear sites of the model.
        vectors: Names of the norm weights that may be replaced.
        tables: Names of the parameters whose rows may be changed.
        dtype: Of the factors.
        device: Where they are multiplied with.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        vectors: Collection[str],
        tables: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._sites = sites
        self._vectors = frozenset(vectors)
        self._tables = frozenset(tables)
        self._modules = frozenset(name for site in sites for name in site.modules)
        self._dtype = dtype
        self._device = device
        self._layouts = Layouts()
        self._spare = SpareMemory()
        self.held: dict[str, PackedAdapter] = {}
        self.token_rows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def prepare(self, weights: AdapterWeights) -> PackedAdapter:
        """Lay an adapter out; may be called on any thread.

        Raises:
            MismatchError: It changes something that is not applied here.
        """
        known = self._modules | self._vectors | self._tables
        lost = sorted({*weights.updates, *weights.vectors, *weights.token_rows} - known)
        if lost:
            raise MismatchError(
                f"The adapter {weights.id[:19]} changes {lost[0]!r}{' and others' if lost[1:] else ''}, which the "
                "engine cannot apply per request; merge it with `haori merge` and serve the merged model."
            )
        packed = pack_adapter(weights, self._sites, self._layouts, self._dtype, self._spare)
        return packed if self._device.type == "cpu" else packed.to(self._device)

    def put(self, adapter: PackedAdapter) -> None:
        """Keep an adapter."""
        self.held[adapter.id] = adapter
        if adapter.token_rows:
            self.token_rows[adapter.id] = adapter.token_rows

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self.held[adapter]
        self.token_rows.pop(adapter, None)
