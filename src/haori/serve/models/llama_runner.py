"""The fast runner: one forward pass of a Llama-like model for all rows of a step, whatever their adapters are.

Rows are tokens. Those of sequences that decode come first, in the order of the cache, so that the attention of a
shelf can be one batched product; then come the prefill chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.adapters.multi_lora import StepPlan, plan_step
from haori.serve.adapters.packed import PackedBank
from haori.serve.engine.kv_cache import CacheShape, KVCache, Shelf
from haori.serve.engine.runner import LOGIT_ROWS, Run
from haori.serve.kernels.torch_kernels import (
    Angles,
    AttentionShape,
    AttentionStep,
    Kernels,
    PrefillChunk,
    ShelfStep,
    TorchKernels,
    norm,
)
from haori.serve.models.llama_weights import LayerWeights, LlamaWeights
from haori.serve.request import AdapterMix

__all__ = ["LlamaRunner"]


@dataclass(frozen=True)
class _Step:
    ids: Tensor
    angles: Angles
    attention: AttentionStep
    plan: StepPlan
    mixes: tuple[tuple[AdapterMix, int, int], ...]  # mix, first row, row behind the last


class LlamaRunner:
    """Computes logits of a Llama-like model.

    Args:
        weights: The model, on the device that computes.
        cache_bytes: Memory for keys and values.
        kernels: The steps between the products; plain torch by default.
    """

    def __init__(self, weights: LlamaWeights, *, cache_bytes: int, kernels: Kernels | None = None) -> None:
        self._w = weights
        self._device = weights.embedding.device
        shape = CacheShape(
            len(weights.layers), weights.kv_heads, weights.head_width, weights.context_length, weights.dtype,
            self._device,
        )  # fmt: skip
        self.cache = KVCache(shape, cache_bytes)
        tables = (weights.embedding_name, weights.head_name)
        head = weights.head_name.removesuffix(".weight")
        self.bank = PackedBank(weights.sites, weights.vector_names, tables, weights.dtype, self._device, head)
        self._shape = AttentionShape(weights.heads, weights.kv_heads, weights.head_width, weights.scale)
        self._kernels = kernels or TorchKernels()
        self._planned: tuple[object, StepPlan] | None = None
        self._spoilt: set[int] = set()  # sequences whose hidden states are no numbers

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> Tensor:
        """Compute one step; return fp32 or bf16 logits, shape (runs that want them, V), in their order."""
        order, step = self._prepare(runs)
        x = self._hidden(step, [runs[number] for number in order])
        lasts, row = {}, 0
        for number in order:
            if runs[number].take_logits is not None:
                self._give_logits(step, x, row, runs[number])
            row += len(runs[number].tokens)
            lasts[number] = row - 1
        wanted = [number for number, run in enumerate(runs) if run.wants_logits]
        return self._logits(step, x, [lasts[number] for number in wanted], [runs[number].adapters for number in wanted])

    def _logits(self, step: _Step, x: Tensor, chosen: Sequence[int], mixes: Sequence[AdapterMix]) -> Tensor:
        """Return the logits of some rows of hidden states (N D), given the mix of each."""
        index = torch.tensor(chosen, dtype=torch.long, device=self._device)
        name, weight = self._w.final_norm
        weight = step.plan.vector(name, weight, len(x))
        x = x.index_select(0, index)
        x = norm(x, weight if weight.dim() == 1 else weight.index_select(0, index), self._w.epsilon)
        logits = self._w.head(x)
        if self.bank.heads:
            for row, mix in enumerate(mixes):
                for adapter, strength in mix:
                    if (head := self.bank.heads.get(adapter)) is not None:
                        logits[row] += strength * ((head[0] @ x[row]) @ head[1])
        if self.bank.token_rows:
            for row, mix in enumerate(mixes):
                for ids, rows, strength in self._head_rows(mix):
                    logits[row, ids] += strength * (rows @ x[row])
        return logits

    def _give_logits(self, step: _Step, x: Tensor, first: int, run: Run) -> None:
        """Hand over the logits after every token of a run, whose rows begin at `first`; never all at once."""
        assert run.take_logits is not None
        for start in range(0, len(run.tokens), LOGIT_ROWS):
            chosen = range(first + start, first + min(start + LOGIT_ROWS, len(run.tokens)))
            run.take_logits(run.start + start, self._logits(step, x, chosen, [run.adapters] * len(chosen)))

    def _hidden(self, step: _Step, runs: Sequence[Run]) -> Tensor:
        """Return the last hidden states (N D) for runs in the order of the rows.

        A row of the cache that is attended to as a whole may end in what another sequence left there, and zero times
        NaN is NaN. That is rare and shows in the result; so then it is cleared, and the step is computed again.
        """
        x = self._layers(step)
        if not math.isfinite(float(x.sum())) and not _no_numbers(x, runs) <= self._spoilt:
            for shelf in step.attention.shelves:
                shelf.shelf.clear_behind(shelf.positions)
            x = self._layers(step)
            self._spoilt = _no_numbers(x, runs)  # of their own doing
        return x

    def _layers(self, step: _Step) -> Tensor:
        x, added = self._embed(step), None
        for index, layer in enumerate(self._w.layers):
            x, added = self._block(index, layer, x, added, step)
        return x if added is None else x + added

    def _prepare(self, runs: Sequence[Run]) -> tuple[list[int], _Step]:
        """Put the rows in order and work out where each writes and what it sees."""
        by_sequence = {run.sequence: number for number, run in enumerate(runs)}
        single = {run.sequence for run in runs if len(run.tokens) == 1}
        for sequence in single:
            self.cache.decode(sequence)
        order: list[int] = []
        shelves: list[ShelfStep] = []
        for shelf in self.cache.shelves:
            present = [sequence for sequence in shelf.order[: shelf.decoding] if sequence in single]
            # A sequence may sit a step out; those after it in the shelf are then attended to one by one.
            together = next((i for i, s in enumerate(shelf.order[: shelf.decoding]) if s not in single), shelf.decoding)
            single -= set(present[together:])
            numbers = [by_sequence[sequence] for sequence in present[:together]]
            if numbers:
                shelves.append(self._shelf_step(shelf, len(order), [runs[number].start for number in numbers]))
                order += numbers
        rest = [number for number, run in enumerate(runs) if run.sequence not in single]
        chunks, row = [], len(order)
        for number in rest:
            chunks.append(self._chunk(runs[number], row))
            row += len(runs[number].tokens)
        order += rest
        ids = [token for number in order for token in runs[number].tokens]
        positions = [runs[n].start + i for n in order for i in range(len(runs[n].tokens))]
        mixes, row = [], 0
        for number in order:
            mixes.append((runs[number].adapters, row, row + len(runs[number].tokens)))
            row = mixes[-1][2]
        at = torch.tensor(positions, device=self._device)
        return order, _Step(
            torch.tensor(ids, device=self._device), Angles(self._w.cosines[at], self._w.sines[at]),
            AttentionStep(tuple(shelves), tuple(chunks)), self._plan(tuple(mixes)), tuple(mixes),
        )  # fmt: skip

    def _plan(self, mixes: tuple[tuple[AdapterMix, int, int], ...]) -> StepPlan:
        """Return the plan for these mixes: the last one still, if they are the same."""
        if self._planned is None or self._planned[0] != mixes:
            lengths = [stop - start for _, start, stop in mixes]
            plan = plan_step([mix for mix, *_ in mixes], lengths, self.bank.held, self._kernels, self._device)
            self._planned = (mixes, plan)
        return self._planned[1]

    def _shelf_step(self, shelf: Shelf, first: int, lengths: list[int]) -> ShelfStep:
        positions = torch.tensor(lengths, device=self._device)
        numbers = torch.arange(len(lengths), device=self._device)
        return ShelfStep(shelf, slice(first, first + len(lengths)), positions, numbers)

    def _chunk(self, run: Run, row: int) -> PrefillChunk:
        shelf, shelf_row = self.cache.locate(run.sequence)
        count = len(run.tokens)
        return PrefillChunk(shelf, shelf_row, slice(row, row + count), run.start, run.start + count)

    def _embed(self, step: _Step) -> Tensor:
        x = functional.embedding(step.ids, self._w.embedding)  # N D
        if self.bank.token_rows:
            for mix, first, stop in step.mixes:
                for ids, rows, strength in self._rows(mix, self._w.embedding_name):
                    at, which = (step.ids[first:stop, None] == ids).nonzero(as_tuple=True)
                    x[first + at] += strength * rows[which]
        return x

    def _head_rows(self, mix: AdapterMix) -> list[tuple[Tensor, Tensor, float]]:
        """Return what `_rows` does of the head, which may be the embedding."""
        return self._rows(mix, self._w.head_name, self._w.embedding_name if self._w.head_tied else None)

    def _rows(self, mix: AdapterMix, table: str, instead: str | None = None) -> list[tuple[Tensor, Tensor, float]]:
        """Return ids, differences of their rows and strength, for each adapter with trained rows of a table."""
        found = []
        for adapter, strength in mix:
            tables = self.bank.token_rows.get(adapter, {})
            rows = tables.get(table, None if instead is None else tables.get(instead))
            if rows is not None:
                found.append((*rows, strength))
        return found

    def _block(
        self, index: int, layer: LayerWeights, x: Tensor, added: Tensor | None, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of x and what came before it, and what this block adds to that sum."""
        plan, site, kernels, epsilon = step.plan, 4 * index, self._kernels, self._w.epsilon
        qkv, o, gate_up, down = layer.linears
        rows = x.shape[0]  # len(x) goes through Python
        x, h = kernels.add_norm(x, added, plan.vector(*layer.attention_norm, rows), epsilon)
        mixed = self._attend(index, plan.linear(site, qkv, layer.biases[0], h), layer, step)
        mixed = plan.linear(site + 1, o, layer.biases[1], mixed)
        x, h = kernels.add_norm(x, mixed, plan.vector(*layer.mlp_norm, rows), epsilon)
        gated = kernels.gate(plan.linear(site + 2, gate_up, layer.biases[2], h))
        return x, plan.linear(site + 3, down, layer.biases[3], gated)

    def _attend(self, index: int, qkv: Tensor, layer: LayerWeights, step: _Step) -> Tensor:
        """Write the new keys and values, attend, and return N (H d)."""
        shape = self._shape
        split = qkv.view(qkv.shape[0], -1, shape.width)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = split[:, : shape.heads], split[:, shape.heads : shape.heads + shape.kv_heads]
            for part, named in ((queries, layer.q_norm), (keys, layer.k_norm)):
                part.copy_(norm(part, _per_head(step.plan.vector(*named, qkv.shape[0])), self._w.epsilon))
        out = qkv.new_empty(qkv.shape[0], shape.heads * shape.width)
        self._kernels.attend(step.attention, index, qkv, step.angles, shape, out)
        return out


def _no_numbers(x: Tensor, runs: Sequence[Run]) -> set[int]:
    """Return the sequences with hidden states that are no numbers."""
    finite = torch.split(x.isfinite().all(1), [len(run.tokens) for run in runs])
    return {run.sequence for run, rows in zip(runs, finite, strict=True) if not rows.all()}


def _per_head(weight: Tensor) -> Tensor:
    """Let one weight per row act on each head of the row."""
    return weight if weight.dim() == 1 else weight.unsqueeze(1)
