"""One frozen base that the rows of several adapters run through together, forward and backward.

Rows of any owners are packed one behind the other; what a row attends to is the row itself. Products with the base's
weights run over all rows, the adapters' own products over each owner's (adapters/fused/row_linears.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haori.adapters.fused import fuse
from haori.adapters.fused.factors import RowAdapters, RowFactors, why_not
from haori.adapters.fused.loss_forward import LossForward, why_no_head
from haori.adapters.fused.modules import PackedRows
from haori.bases import linear_modules, load_model
from haori.core.errors import BaseError, InputError, TrainingError
from haori.core.events import EventSink, Said, discard
from haori.jobs.tenants.records import AdapterSpec
from haori.jobs.tenants.rows import Row
from haori.jobs.tenants.scoring import score_rows
from haori.jobs.tenants.tenant import Gradients, LoraPair

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["HEAD", "Part", "SharedModel"]

HEAD = "lm_head"


@dataclass
class Part:
    """Rows of one owner in a batch; after it has run, their gradients, or why there are none.

    Attributes:
        owner: What errors call it.
        factors: Its adapter.
        rows: Its rows; each gets its log-probabilities.
    """

    owner: str
    factors: Mapping[str, LoraPair]
    rows: Sequence[Row]
    gradients: Gradients = field(default_factory=dict)
    problem: TrainingError | None = None


class SharedModel:
    """A base in memory with room for adapters by rows.

    Args:
        base: A causal language model.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        on_event: Receives a line on what runs fused.

    Raises:
        BaseError: The base cannot be loaded or trained so.
    """

    def __init__(self, base: "Base", *, dtype: str = "auto", on_event: EventSink = discard) -> None:
        model: Any = load_model(base, dtype=dtype)
        if not model.can_generate() or not hasattr(model, HEAD):
            raise BaseError(f"The base {base.name!r} writes no text, so it cannot be trained through this interface.")
        if (reason := why_no_head(model)) is not None:
            raise BaseError(
                f"The base {base.name!r} cannot be trained by several tenants: of its output head, {reason}."
            )
        self.base, self.model = base, model
        self.vocabulary, self.context_length = int(model.lm_head.weight.shape[0]), base.context_length
        self.modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in linear_modules(model)}
        self.attention = {n for n in self.modules if re.search(r"attn|attention", n.rpartition(".")[0], re.IGNORECASE)}
        self._adapters = {name: RowAdapters(layer) for name, layer in self.modules.items()}
        self.fused = fuse(model)
        on_event(Said(text=self.fused.report.sentence()))
        forward: Any = model.forward
        # It was tried on rows that share a beginning whether the model takes positions and layouts as they are given.
        self._packs = isinstance(forward, LossForward) and forward.shares_prefix
        windows = forward.windows if isinstance(forward, LossForward) else []
        self._longest_packed = min(windows, default=self.context_length)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        device: torch.device = self.model.lm_head.weight.device
        return device

    def targets(self, spec: AdapterSpec) -> list[str]:
        """Return the full names of the modules that an adapter changes, in the model's order.

        Raises:
            InputError: It changes none, or one of a kind that cannot be trained so.
        """
        names = [n for n in self.modules if (spec.train_attn if n in self.attention else spec.train_mlp)]
        names += [HEAD] if spec.train_unembed else []
        if not names:
            raise InputError("The adapter would train nothing; set train_attn, train_mlp or train_unembed.")
        self.check_targets(names)
        return names

    def check_targets(self, names: Sequence[str]) -> None:
        """Refuse modules that cannot carry adapters by rows.

        Raises:
            InputError: One is named.
        """
        for name in names:
            layer = self.model.lm_head if name == HEAD else self.modules.get(name)
            reason = "the base has no such linear module" if layer is None else why_not(layer)
            if reason is not None:
                raise InputError(f"The module {name!r} of {self.base.name!r} cannot be trained here: {reason}.")

    def run(self, parts: Sequence[Part], *, backward: bool) -> int:
        """Score the rows of all parts, and form their gradients; a part that fails says so in `problem`.

        Returns:
            Tokens that went through.
        """
        together = self._packs and all(row.length <= self._longest_packed for part in parts for row in part.rows)
        if together:
            self._run(parts, packed=True, backward=backward)
        else:
            for part in parts:
                for row in part.rows:
                    alone = Part(part.owner, part.factors, [row])
                    self._run([alone], packed=False, backward=backward)
                    _merge(part, alone)
        return sum(row.length for part in parts for row in part.rows)

    def _run(self, parts: Sequence[Part], *, packed: bool, backward: bool) -> None:
        rows = [row for part in parts for row in sorted(part.rows, key=lambda row: row.length)]
        spans = _spans(parts)
        with torch.set_grad_enabled(backward), self._acting(parts, spans):
            hidden = self._hidden(rows, packed=packed)  # [N, D]
        own = {number: part.factors[HEAD] for number, part in enumerate(parts) if HEAD in part.factors}
        adapters = [RowFactors(*spans[number], pair.a, pair.b, pair.scale) for number, pair in own.items()]
        scored = score_rows(rows, hidden.detach(), self.model.lm_head.weight.detach(), adapters, backward=backward)
        gradient = scored.gradient
        for part, (start, stop) in zip(parts, spans, strict=True):
            part.problem = _why_not_finite(part, None if gradient is None else gradient[start:stop])
            if part.problem is not None and gradient is not None:
                gradient[start:stop] = 0
        if gradient is not None:
            self._back(parts, hidden, gradient, dict(zip(own, scored.factors, strict=True)))

    def _hidden(self, rows: Sequence[Row], *, packed: bool) -> Tensor:
        lengths = tuple(row.length for row in rows)
        ids = torch.cat([row.tokens for row in rows]).unsqueeze(0).to(self.device)
        options: dict[str, Any] = {}
        if packed:
            positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(self.device)
            given = torch.zeros(1, 1, 1, 1, device=self.device)  # four dimensions: transformers builds no mask
            options = {"position_ids": positions, "attention_mask": given, "row_layout": PackedRows(lengths)}
        hidden: Tensor = self.model.model(input_ids=ids, use_cache=False, **options)[0][0]
        return hidden

    def _back(
        self, parts: Sequence[Part], hidden: Tensor, gradient: Tensor, head: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        body = [(part, name) for part in parts for name in part.factors if name != HEAD]
        factors = [factor for part, name in body for factor in (part.factors[name].a, part.factors[name].b)]
        found = iter(torch.autograd.grad(hidden, factors, gradient.to(hidden.dtype)) if factors else ())
        for part, name in body:
            part.gradients[name] = next(found), next(found)
        for number, pair in head.items():
            parts[number].gradients[HEAD] = pair
        for part in parts:
            if part.problem is None and not _is_finite([g for pair in part.gradients.values() for g in pair]):
                part.problem = TrainingError(
                    f"The gradients of {part.owner!r} are not finite, so nothing was added; lower the weights or "
                    "advantages, or go back to an earlier checkpoint."
                )

    @contextmanager
    def _acting(self, parts: Sequence[Part], spans: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Let each part's adapter act on its rows inside the block."""
        try:
            for part, span in zip(parts, spans, strict=True):
                for name, pair in part.factors.items():
                    if name != HEAD:
                        self._adapters[name].active.append(RowFactors(*span, pair.a, pair.b, pair.scale))
            yield
        finally:
            for adapters in self._adapters.values():
                adapters.active.clear()


def _spans(parts: Sequence[Part]) -> list[tuple[int, int]]:
    found, start = [], 0
    for part in parts:
        stop = start + sum(row.length for row in part.rows)
        found.append((start, stop))
        start = stop
    return found


def _merge(part: Part, alone: Part) -> None:
    """Add what one row of a part gave."""
    part.problem = part.problem or alone.problem
    for name, (da, db) in alone.gradients.items():
        if name in part.gradients:
            part.gradients[name][0].add_(da)
            part.gradients[name][1].add_(db)
        else:
            part.gradients[name] = da, db


def _why_not_finite(part: Part, gradient: Tensor | None) -> TrainingError | None:
    for row in part.rows:
        assert row.logprobs is not None
        if not torch.isfinite(row.logprobs).all() or not torch.isfinite(torch.tensor(row.loss_sum())):
            return TrainingError(
                f"The loss of row {row.number} of {part.owner!r} is not finite, so nothing was added; see its weights, "
                "advantages and log-probabilities, or go back to an earlier checkpoint."
            )
    if gradient is not None and not torch.isfinite(gradient).all():
        return TrainingError(f"The gradients of {part.owner!r} are not finite, so nothing was added.")
    return None


def _is_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()) if tensors else True
