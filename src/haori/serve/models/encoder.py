"""An encoder whose rows each have their own mix of adapters: texts of the base, of adapters and of blends in one batch.

    y = output_scale * (W x) + B A x + bias          by rows; see `adapter_weights`

The model's own forward runs over the whole batch, and hooks add to the rows of each mix what its adapters change: in
linear layers, layer norms and embeddings. Which modules see one slice per row is measured with a probe, so a module
that is shared between rows (relative positions, say) takes no adapter: it could not be changed for one row alone.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from haori.core.errors import BaseError, MismatchError
from haori.serve.adapters.weights import AdapterWeights, ModuleUpdate
from haori.serve.embedding.layout import EmbeddingLayout
from haori.serve.request import AdapterMix

__all__ = ["AdaptedEncoder", "EncoderBank", "Row"]

_PROBE_ROWS, _PROBE_TOKENS = 3, 7


class Row(NamedTuple):
    """A text as token ids, and the adapters that act on it."""

    ids: Sequence[int]
    mix: AdapterMix


class _Span(NamedTuple):
    """Neighbouring rows of a batch under one mix."""

    rows: slice
    mix: AdapterMix


class EncoderBank:
    """The adapters in memory, and what they may change.

    Args:
        model: The encoder.
        sites: Full names of the modules that see one slice per row.
    """

    def __init__(self, model: nn.Module, sites: Collection[str]) -> None:
        self.held: dict[str, AdapterWeights] = {}
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        modules = {name: module for name, module in model.named_modules() if name in sites}
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
            MismatchError: It changes something that cannot be changed for single rows.
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
        self.held[adapter.id] = adapter

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self.held[adapter]


class AdaptedEncoder:
    """Turns token ids into vectors; used from one thread at a time.

    Args:
        model: The encoder, which gets hooks.
        layout: How hidden states become vectors.
        pad: Token id that fills short rows.
        name: What errors call the base.

    Raises:
        BaseError: The model is no encoder.
    """

    def __init__(self, model: Any, layout: EmbeddingLayout, *, pad: int, name: str) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise BaseError(f"The base {name!r} is an encoder with a decoder, which is not served; choose an encoder.")
        self._model = model
        self._layout = layout
        self._pad = pad
        self._spans: list[_Span] = []
        sites = self._probe(name)
        self.bank = EncoderBank(model, sites)
        for site, module in model.named_modules():
            if site in sites:
                self._hook(site, module)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and adapters."""
        found = self._model.dtype
        assert isinstance(found, torch.dtype)
        return found

    @torch.inference_mode()
    def vectors(self, rows: Sequence[Row]) -> Tensor:
        """Return the vectors of a batch, N D in fp32, in the order of `rows`.

        The adapters of every mix are in the bank.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].mix)
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)  # B T
        mask = torch.zeros_like(ids)
        for place, index in enumerate(order):
            count = len(rows[index].ids)
            ids[place, :count] = torch.tensor(rows[index].ids)
            mask[place, :count] = 1
        self._spans = list(_spans([rows[index].mix for index in order]))
        try:
            states = self._states(ids, mask).float()
        finally:
            self._spans = []
        pooled = self._pool(states, mask.float())
        found = torch.empty_like(pooled)
        found[torch.tensor(order)] = pooled
        return found

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self._layout.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # B D
        return functional.normalize(pooled, dim=1) if self._layout.normalise else pooled

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # B T D
        return states

    @torch.inference_mode()
    def _probe(self, name: str) -> set[str]:
        """Return the modules that see one slice per row, and make sure that every token sees those after it."""
        seen: dict[str, bool] = {}

        def look(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                by_row = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].shape[:1] == (_PROBE_ROWS,)
                seen[site] = by_row and seen.get(site, True)

            return hook

        handles = [module.register_forward_pre_hook(look(site)) for site, module in self._model.named_modules()]
        ids = torch.arange(_PROBE_ROWS * _PROBE_TOKENS).reshape(_PROBE_ROWS, -1) * 37 % self._model.config.vocab_size
        try:
            states = self._states(ids, torch.ones_like(ids))
            ids[:, -1] = (ids[:, -1] + 1) % self._model.config.vocab_size
            changed = self._states(ids, torch.ones_like(ids))
        except (AttributeError, TypeError) as error:
            raise BaseError(f"The base {name!r} gives no hidden states for token ids ({error}).") from None
        finally:
            for handle in handles:
                handle.remove()
        if torch.equal(states[:, 0], changed[:, 0]):
            raise BaseError(
                f"In the base {name!r} no token sees those after it, so it is a decoder; embeddings need an encoder "
                "such as 'all-minilm-l6-v2'."
            )
        return {site for site, by_row in seen.items() if by_row}

    def _hook(self, site: str, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(self._linear_hook(site))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_hook(self._norm_hook(site))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(self._embedding_hook(f"{site}.weight"))

    def _acting(self, span: _Span) -> list[tuple[AdapterWeights, float]]:
        return [(self.bank.held[adapter], strength) for adapter, strength in span.mix]

    def _linear_hook(self, site: str) -> Callable[[nn.Linear, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            for span in self._spans:
                updates = [(weights.updates.get(site), strength) for weights, strength in self._acting(span)]
                given = [(update, strength) for update, strength in updates if update is not None]
                if given:
                    _add_updates(given, inputs[0][span.rows], output[span.rows], module.bias)

        return hook

    def _norm_hook(self, site: str) -> Callable[[nn.LayerNorm, tuple[Tensor], Tensor], None]:
        def hook(module: nn.LayerNorm, inputs: tuple[Tensor], output: Tensor) -> None:
            for span in self._spans:
                acting = self._acting(span)
                weight = _changed(module.weight, f"{site}.weight", acting)
                bias = _changed(module.bias, f"{site}.bias", acting)
                if weight is not module.weight or bias is not module.bias:
                    x = inputs[0][span.rows]
                    shape = list(module.normalized_shape)
                    output[span.rows] = functional.layer_norm(x, shape, weight, bias, module.eps)

        return hook

    def _embedding_hook(self, table: str) -> Callable[[nn.Embedding, tuple[Tensor], Tensor], None]:
        def hook(_module: nn.Embedding, inputs: tuple[Tensor], output: Tensor) -> None:
            for span in self._spans:
                for weights, strength in self._acting(span):
                    if table in weights.token_rows:
                        tokens, rows = weights.token_rows[table]  # K, K D
                        hit = inputs[0][span.rows][..., None] == tokens  # B T K
                        output[span.rows] += strength * (hit.to(rows.dtype) @ rows)

        return hook


def _add_updates(given: Sequence[tuple[ModuleUpdate, float]], x: Tensor, y: Tensor, bias: Tensor | None) -> None:
    """Add what adapters change to y = W x + bias, in place."""
    plain = None
    if any(update.output_scale is not None for update, _ in given):
        plain = y.clone() if bias is None else y - bias  # W x
    for update, strength in given:
        if plain is not None and update.output_scale is not None:
            y += (strength * (update.output_scale - 1)).to(y.dtype) * plain
        if update.a is not None and update.b is not None:
            y += strength * ((x @ update.a.T) @ update.b)
        if update.bias is not None:
            y += (strength * update.bias).to(y.dtype)


def _changed(parameter: Tensor | None, name: str, acting: Sequence[tuple[AdapterWeights, float]]) -> Tensor | None:
    result = parameter
    for weights, strength in acting:
        if result is not None and name in weights.vectors:
            result = result + (strength * weights.vectors[name]).to(result.dtype)
    return result


def _spans(mixes: Sequence[AdapterMix]) -> Iterator[_Span]:
    """Yield the neighbouring rows under each mix; rows of the bare base need nothing."""
    start = 0
    for mix, group in groupby(mixes):
        stop = start + len(list(group))
        if mix:
            yield _Span(slice(start, stop), mix)
        start = stop
