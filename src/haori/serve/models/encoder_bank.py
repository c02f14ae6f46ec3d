"""The adapters of an encoder in memory, and what they may change of it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from haori.core.errors import MismatchError
from haori.serve.adapters.reading import AdapterWeights
from haori.serve.request import AdapterMix

__all__ = ["ClassifierWeights", "EncoderBank", "EncoderSites"]


@dataclass(frozen=True)
class ClassifierWeights(AdapterWeights):
    """An adapter with a head of its own.

    Attributes:
        head: The head's parameters, in fp32.
        pooler: Parameters that it has instead of those of the encoder's pooler, by full name in the encoder.
    """

    head: Mapping[str, Tensor] = field(default_factory=dict)
    pooler: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderSites:
    """Full names of the modules that an encoder calls.

    Attributes:
        by_row: Those that see one slice per row.
        shared: Those that see, perhaps among other things, something that all rows share, such as positions.
    """

    by_row: frozenset[str]
    shared: frozenset[str] = frozenset()


class EncoderBank:
    """The adapters in memory, and what they may change.

    Args:
        model: The encoder.
        sites: Its modules.
    """

    def __init__(self, model: nn.Module, sites: EncoderSites) -> None:
        self.held: dict[str, AdapterWeights] = {}
        self._alone: set[str] = set()
        self._shared = sites.shared
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        called = sites.by_row | sites.shared
        modules: dict[str, Any] = {name: module for name, module in model.named_modules() if name in called}
        self._linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        norms = [name for name, module in modules.items() if isinstance(module, nn.LayerNorm)]
        self._vectors = {f"{name}.{part}" for name in norms for part in ("weight", "bias")}
        self._tables = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Embedding)}

    @property
    def names(self) -> Collection[str]:
        """Full names of all parameters of the base."""
        return self._parameters.keys()

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return (D_out, D_in) of a linear module that takes updates."""
        found = self._linears.get(name)
        return None if found is None else (found.out_features, found.in_features)

    @property
    def tables(self) -> Collection[str]:
        """None: a whole table for each row of a batch would cost more than the encoder."""
        return ()

    def weight(self, module: str) -> Tensor:
        """Return the weight (D_out, D_in) of a linear module."""
        return self._parameters[f"{module}.weight"]

    def tensor(self, name: str) -> Tensor:
        """Return a parameter of the base."""
        return self._parameters[name]

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """Refuse an adapter that cannot be served.

        Raises:
            MismatchError: It changes something that the encoder does not call as a module.
        """
        lost = set(weights.updates) - set(self._linears)
        lost |= set(weights.vectors) - self._vectors
        lost |= set(weights.token_rows) - self._tables
        if lost:
            raise MismatchError(
                f"The adapter {weights.id[:19]} changes {min(lost)!r}, which cannot be changed for one text alone; "
                "merge it with `haori merge` and serve the merged model."
            )
        return weights

    def put(self, adapter: AdapterWeights) -> None:
        """Keep an adapter."""
        changed = {*adapter.updates, *(name.rpartition(".")[0] for name in (*adapter.vectors, *adapter.token_rows))}
        if not changed.isdisjoint(self._shared):
            self._alone.add(adapter.id)
        self.held[adapter.id] = adapter

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self.held[adapter]
        self._alone.discard(adapter)

    def acts_on_shared(self, mix: AdapterMix) -> bool:
        """Say whether a mix changes what all rows of a batch share, so that its rows need a batch of their own."""
        return bool(self._alone) and any(adapter in self._alone for adapter, _ in mix)

    def head(self, mix: AdapterMix) -> Mapping[str, Tensor]:
        """Return the head of the one adapter of a mix."""
        [(adapter, _)] = mix
        held = self.held[adapter]
        assert isinstance(held, ClassifierWeights)
        return held.head

    def pooler(self, mix: AdapterMix) -> Mapping[str, Tensor]:
        """Return what the adapters of a mix have instead of the encoder's pooler."""
        held = [self.held[adapter] for adapter, _ in mix]
        return {
            name: own for found in held if isinstance(found, ClassifierWeights) for name, own in found.pooler.items()
        }
