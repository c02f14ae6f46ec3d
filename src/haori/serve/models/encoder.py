"""An encoder whose rows each have their own mix of adapters: texts of the base, of adapters and of blends in one batch.

    y = output_scale * (W x) + B A x + bias          by rows; see `adapter_weights`

The model's own forward runs over the whole batch, and hooks add to the rows of each mix what its adapters change: in
linear layers, layer norms and embeddings. Which modules see one slice per row is measured with a probe. A module that
also sees what rows share (relative positions, say) cannot be changed for one row alone: rows whose adapters change one
are computed in a batch of their own. Behind the encoder, rows are pooled to vectors or given to the head of their
adapter. Where padding would change a text, texts of one length share a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from haori.core.errors import BaseError
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.embedding.layout import EmbeddingLayout
from haori.serve.models.classifier_form import ClassifierForm, HiddenStates
from haori.serve.models.encoder_bank import EncoderBank, EncoderSites
from haori.serve.request import AdapterMix

__all__ = ["AdaptedEncoder", "Row"]

_PROBE_ROWS, _PROBE_TOKENS = 3, 7


class Row(NamedTuple):
    """A text as token ids, the adapters that act on it, and whether it is to be classified, or embedded."""

    ids: Sequence[int]
    mix: AdapterMix
    classify: bool = False


class _Span(NamedTuple):
    """Neighbouring rows of a batch under one mix and for one purpose."""

    rows: slice
    mix: AdapterMix
    classify: bool


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
        self._is_alone = False
        self._form: ClassifierForm | None = None
        self._own_head: Mapping[str, Tensor] = {}
        self.probe = torch.arange(_PROBE_ROWS * _PROBE_TOKENS).reshape(_PROBE_ROWS, -1) * 37 % model.config.vocab_size
        sites = self._called_modules(name)
        self._may_pad = self._measure_padding()
        self.bank = EncoderBank(model, sites)
        for site, module in model.named_modules():
            if site in sites.by_row or site in sites.shared:
                self._hook(site, module, shared=site in sites.shared)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and adapters."""
        found = self._model.dtype
        assert isinstance(found, torch.dtype)
        return found

    @property
    def kept_positions(self) -> int:
        """Return how many positions are no text's: RoBERTa and its kin number those of texts from behind padding's."""
        tables = [m for name, m in self._model.named_modules() if name.endswith("position_embeddings")]
        kept = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
        return max(kept, default=-1) + 1

    def classify_by(self, form: ClassifierForm, own_head: Mapping[str, Tensor]) -> None:
        """Compute logits from now on, of rows that are to be classified.

        Args:
            form: What follows the encoder.
            own_head: The base's own head, in fp32; empty where it has none.
        """
        self._form, self._own_head = form, own_head
        for site in {form.inner(name.rpartition(".")[0]) for name in form.poolers}:
            if isinstance(module := self._model.get_submodule(site), nn.Linear):
                module.register_forward_hook(self._pooler_hook(str(site)))

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        """Return the vector (D) of each row, or its logits where it is to be classified, in fp32.

        The adapters of every mix are in the bank.
        """
        found: dict[int, Tensor] = {}
        groups: dict[tuple[AdapterMix | None, int | None], list[int]] = {}
        for index in sorted(range(len(rows)), key=lambda i: (rows[i].mix, rows[i].classify)):
            mix = rows[index].mix
            alone = mix if self.bank.acts_on_shared(mix) else None
            groups.setdefault((alone, None if self._may_pad else len(rows[index].ids)), []).append(index)
        for (alone, _), order in groups.items():
            self._compute(rows, order, found, alone=alone is not None)
        return [found[i] for i in range(len(rows))]

    def _compute(self, rows: Sequence[Row], order: Sequence[int], found: dict[int, Tensor], *, alone: bool) -> None:
        """Compute rows in one batch, in an order in which those of one mix are neighbours."""
        longest = max(len(rows[index].ids) for index in order)
        ids = torch.full((len(order), longest), self._pad)  # B T
        mask = torch.zeros_like(ids)
        for place, index in enumerate(order):
            count = len(rows[index].ids)
            ids[place, :count] = torch.tensor(rows[index].ids)
            mask[place, :count] = 1
        spans = list(_spans([rows[index] for index in order]))
        self._spans = [span for span in spans if span.mix]  # rows of the bare base need nothing
        self._is_alone = alone
        try:
            hidden = self._hidden(ids, mask)
        finally:
            self._spans = []
        embeds = not all(span.classify for span in spans)
        vectors = self._pool(hidden.states.float(), mask.float()) if embeds else hidden.states
        for span in spans:
            results = self._logits(span, hidden) if span.classify else vectors[span.rows]
            found.update(zip(order[span.rows], results, strict=True))

    def _logits(self, span: _Span, hidden: HiddenStates) -> Tensor:
        assert self._form is not None
        return self._form.logits(self.bank.head(span.mix) if span.mix else self._own_head, hidden.rows(span.rows))

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self._layout.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # B D
        return functional.normalize(pooled, dim=1) if self._layout.normalise else pooled

    def _hidden(self, ids: Tensor, mask: Tensor) -> HiddenStates:
        found = self._model(input_ids=ids, attention_mask=mask)
        return HiddenStates(ids, mask, found.last_hidden_state, getattr(found, "pooler_output", None))

    @torch.inference_mode()
    def _called_modules(self, name: str) -> EncoderSites:
        """Return the modules that are called, and make sure that every token sees those after it."""
        seen: dict[str, bool] = {}

        def record(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                by_row = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].shape[:1] == (_PROBE_ROWS,)
                seen[site] = by_row and seen.get(site, True)

            return hook

        handles = [module.register_forward_pre_hook(record(site)) for site, module in self._model.named_modules()]
        ids = self.probe.clone()
        try:
            states = self._hidden(ids, torch.ones_like(ids)).states
            ids[:, -1] = (ids[:, -1] + 1) % self._model.config.vocab_size
            changed = self._hidden(ids, torch.ones_like(ids)).states
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
        by_row = frozenset(site for site, is_by_row in seen.items() if is_by_row)
        return EncoderSites(by_row, frozenset(seen) - by_row)

    @torch.inference_mode()
    def _measure_padding(self) -> bool:
        """Say whether padding leaves the states of a text as they are, as it does where attention is masked."""
        ids, count = self.probe[:1], _PROBE_TOKENS // 2
        mask = (torch.arange(_PROBE_TOKENS) < count).long()[None]
        padded = self._hidden(ids * mask + self._pad * (1 - mask), mask).states[:, :count].float()
        alone = self._hidden(ids[:, :count], torch.ones(1, count, dtype=torch.long)).states.float()
        difference, size = (torch.linalg.vector_norm(states) for states in (padded - alone, alone))
        return bool(difference <= (1e-4 if self.dtype == torch.float32 else 0.1) * size)

    def _hook(self, site: str, module: nn.Module, *, shared: bool) -> None:
        hook: Callable[[Any, Any, Tensor], None]
        if isinstance(module, nn.Linear):
            hook = self._linear_hook(site)
        elif isinstance(module, nn.LayerNorm):
            hook = self._norm_hook(site)
        elif isinstance(module, nn.Embedding):
            hook = self._embedding_hook(f"{site}.weight")
        else:
            return
        module.register_forward_hook(self._only_alone(hook) if shared else hook)

    def _only_alone(self, hook: Callable[[Any, Any, Tensor], None]) -> Callable[[Any, Any, Tensor], None]:
        """Return a hook that acts on all of what a module sees, where a whole batch is of one mix."""

        def act(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if self._is_alone and self._spans:
                spans, self._spans = self._spans, [_Span(slice(None), self._spans[0].mix, classify=False)]
                try:
                    hook(module, inputs, output)
                finally:
                    self._spans = spans

        return act

    def _pooler_hook(self, site: str) -> Callable[[nn.Linear, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            for span in self._spans:
                if own := self.bank.pooler(span.mix):
                    weight, bias = own.get(f"{site}.weight", module.weight), own.get(f"{site}.bias", module.bias)
                    given = inputs[0][span.rows].float()
                    output[span.rows] = functional.linear(given, weight.float(), bias.float()).to(output.dtype)

        return hook

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


def _spans(rows: Sequence[Row]) -> Iterator[_Span]:
    """Yield the neighbouring rows under each mix and for each purpose."""
    start = 0
    for (mix, classify), group in groupby(rows, key=lambda row: (row.mix, row.classify)):
        stop = start + len(list(group))
        yield _Span(slice(start, stop), mix, classify)
        start = stop
