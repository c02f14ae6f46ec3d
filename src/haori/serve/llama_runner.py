"""The fast runner: one pass through a Llama-like model for all rows of a step, whatever adapters they wear.

Rows are tokens. Those of sequences that decode come first, in the order in which the cache holds them, so that a
shelf's attention is one batched product; then come the chunks of prompts, each attending on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from haori.serve.adapter_bank import ArenaBank
from haori.serve.kv_cache import CacheShape, KVCache, Shelf
from haori.serve.llama_weights import LayerWeights, LlamaWeights
from haori.serve.multi_lora import StepPlan, plan_step
from haori.serve.request import AdapterMix
from haori.serve.runner import Run

__all__ = ["LlamaRunner"]

_HIDDEN = -1e30  # score of a place that is not looked at; finite, so that nothing becomes NaN


@dataclass(frozen=True)
class _ShelfStep:
    """The decoding rows of one shelf: which rows of the step, and where they write and look."""

    shelf: Shelf
    rows: slice
    count: int
    numbers: Tensor  # of the rows in the shelf
    places: Tensor  # of each row's new token
    mask: Tensor  # [count * Hkv, G, capacity]


class _Chunk(NamedTuple):
    """A chunk of one prompt: its rows of the step, its place in the cache, what its tokens may see."""

    shelf: Shelf
    row: int
    rows: slice
    start: int
    stop: int
    mask: Tensor  # [G * tokens, stop]


@dataclass(frozen=True)
class _Step:
    ids: Tensor
    cosines: Tensor  # N 1 d
    sines: Tensor
    shelves: tuple[_ShelfStep, ...]
    chunks: tuple[_Chunk, ...]
    plan: StepPlan
    mixes: tuple[tuple[AdapterMix, int, int], ...]  # mix, first row, row behind the last


class LlamaRunner:
    """Computes logits of a Llama-like model.

    Args:
        weights: The model.
        cache_bytes: Memory for keys and values.
        adapter_bytes: Memory for adapters.
    """

    def __init__(self, weights: LlamaWeights, *, cache_bytes: int, adapter_bytes: int) -> None:
        self._w = weights
        self._device = weights.embedding.device
        shape = CacheShape(
            len(weights.layers), weights.kv_heads, weights.head_width, weights.context_length, weights.dtype,
            self._device,
        )  # fmt: skip
        self.cache = KVCache(shape, cache_bytes)
        self.bank = ArenaBank(weights.sites, weights.vector_names, weights.dtype, adapter_bytes)
        self._planned: tuple[object, StepPlan] | None = None

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> Tensor:
        """Compute one step; return fp32 or bf16 logits, shape (runs that want them, V), in their order."""
        order, step = self._prepare(runs)
        x = self._embed(step)
        for index, layer in enumerate(self._w.layers):
            x = self._block(index, layer, x, step)
        lasts, row = {}, 0
        for number in order:
            row += len(runs[number].tokens)
            lasts[number] = row - 1
        wanted = [number for number, run in enumerate(runs) if run.wants_logits]
        chosen = torch.tensor([lasts[number] for number in wanted], dtype=torch.long, device=self._device)
        name, weight = self._w.final_norm
        weight = step.plan.vector(name, weight, len(x))
        x = x.index_select(0, chosen)
        x = _norm(x, weight if weight.dim() == 1 else weight.index_select(0, chosen), self._w.epsilon)
        logits = self._w.head(x)
        if self._w.head_tied and self.bank.token_rows:
            for place, number in enumerate(wanted):
                for ids, rows, strength in self._token_rows(runs[number].adapters):
                    logits[place, ids] += strength * (rows @ x[place])
        return logits

    def _prepare(self, runs: Sequence[Run]) -> tuple[list[int], _Step]:
        """Put the rows in order and work out where each writes and what it sees."""
        by_sequence = {run.sequence: number for number, run in enumerate(runs)}
        single = {run.sequence for run in runs if len(run.tokens) == 1}
        for sequence in single:
            self.cache.decode(sequence)
        order: list[int] = []
        shelves: list[_ShelfStep] = []
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
            torch.tensor(ids, device=self._device), self._w.cosines[at].unsqueeze(1), self._w.sines[at].unsqueeze(1),
            tuple(shelves), tuple(chunks), self._plan(tuple(mixes)), tuple(mixes),
        )  # fmt: skip

    def _plan(self, mixes: tuple[tuple[AdapterMix, int, int], ...]) -> StepPlan:
        """Return the plan for these mixes: the last one still, if nothing has changed."""
        key = (mixes, self.bank.version)
        if self._planned is None or self._planned[0] != key:
            plan = plan_step([mix for mix, _, _ in mixes], [b - a for _, a, b in mixes], self.bank, self._device)
            self._planned = ((mixes, self.bank.version), plan)
        return self._planned[1]

    def _shelf_step(self, shelf: Shelf, first: int, lengths: list[int]) -> _ShelfStep:
        places = torch.tensor(lengths, device=self._device)
        count = len(lengths)
        hidden = torch.arange(shelf.capacity, device=self._device) > places[:, None]  # count T
        mask = torch.zeros(count, shelf.capacity, dtype=self._w.dtype, device=self._device).masked_fill_(
            hidden, _HIDDEN
        )
        groups = self._w.heads // self._w.kv_heads
        mask = mask[:, None, None].expand(-1, self._w.kv_heads, groups, -1).reshape(-1, groups, shelf.capacity)
        return _ShelfStep(
            shelf, slice(first, first + count), count, torch.arange(count, device=self._device), places, mask
        )

    def _chunk(self, run: Run, row: int) -> _Chunk:
        shelf, place = self.cache.place(run.sequence)
        count, stop = len(run.tokens), run.start + len(run.tokens)
        seen = torch.arange(run.start, stop, device=self._device)
        hidden = torch.arange(stop, device=self._device) > seen[:, None]  # tokens T
        mask = torch.zeros(count, stop, dtype=self._w.dtype, device=self._device).masked_fill_(hidden, _HIDDEN)
        groups = self._w.heads // self._w.kv_heads
        return _Chunk(shelf, place, slice(row, row + count), run.start, stop, mask.repeat(groups, 1))

    def _embed(self, step: _Step) -> Tensor:
        x = functional.embedding(step.ids, self._w.embedding)  # N D
        if self.bank.token_rows:
            for mix, first, stop in step.mixes:
                for ids, rows, strength in self._token_rows(mix):
                    at, which = (step.ids[first:stop, None] == ids).nonzero(as_tuple=True)
                    x[first + at] += strength * rows[which]
        return x

    def _token_rows(self, mix: AdapterMix) -> list[tuple[Tensor, Tensor, float]]:
        """Return ids, differences of their embeddings and strength, for each adapter with trained tokens."""
        found = []
        for adapter, strength in mix:
            rows = self.bank.token_rows.get(adapter, {}).get(self._w.embedding_name)
            if rows is not None:
                found.append((*rows, strength))
        return found

    def _block(self, index: int, layer: LayerWeights, x: Tensor, step: _Step) -> Tensor:
        plan, site, w = step.plan, 4 * index, self._w
        qkv, o, gate_up, down = layer.linears
        h = _norm(x, plan.vector(*layer.attention_norm, len(x)), w.epsilon)
        mixed = self._attend(index, plan.linear(site, qkv, layer.biases[0], h), layer, step)
        x = x + plan.linear(site + 1, o, layer.biases[1], mixed)
        h = _norm(x, plan.vector(*layer.mlp_norm, len(x)), w.epsilon)
        gate, up = plan.linear(site + 2, gate_up, layer.biases[2], h).chunk(2, dim=-1)
        return x + plan.linear(site + 3, down, layer.biases[3], functional.silu(gate) * up)

    def _attend(self, index: int, qkv: Tensor, layer: LayerWeights, step: _Step) -> Tensor:
        """Write the new keys and values, attend, and return N (H d)."""
        w, n = self._w, len(qkv)
        both = w.heads + w.kv_heads
        q_k = qkv[:, : both * w.head_width].view(n, both, w.head_width)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_k = torch.cat([
                _norm(q_k[:, : w.heads], _per_head(step.plan.vector(*layer.q_norm, n)), w.epsilon),
                _norm(q_k[:, w.heads :], _per_head(step.plan.vector(*layer.k_norm, n)), w.epsilon),
            ], 1)  # fmt: skip
        q_k = _rotate(q_k, step.cosines, step.sines)
        values = qkv[:, both * w.head_width :].view(n, w.kv_heads, w.head_width)
        groups = w.heads // w.kv_heads
        queries = q_k[:, : w.heads].view(n, w.kv_heads, groups, w.head_width)
        keys = q_k[:, w.heads :]
        out = torch.empty_like(queries)
        for part in step.shelves:
            k_cache, v_cache = part.shelf.keys[index], part.shelf.values[index]
            k_cache[part.numbers, :, part.places] = keys[part.rows]
            v_cache[part.numbers, :, part.places] = values[part.rows]
            k = k_cache[: part.count].flatten(0, 1).transpose(1, 2)  # count*Hkv d T
            v = v_cache[: part.count].flatten(0, 1)  # count*Hkv T d
            q = queries[part.rows].flatten(0, 1)  # count*Hkv G d
            y = torch.bmm(torch.softmax(torch.baddbmm(part.mask, q, k, alpha=w.scale), -1), v)
            out[part.rows] = y.view(part.count, w.kv_heads, groups, w.head_width)
        for chunk in step.chunks:
            k_row, v_row = chunk.shelf.keys[index][chunk.row], chunk.shelf.values[index][chunk.row]
            k_row[:, chunk.start : chunk.stop] = keys[chunk.rows].transpose(0, 1)
            v_row[:, chunk.start : chunk.stop] = values[chunk.rows].transpose(0, 1)
            q = queries[chunk.rows].permute(1, 2, 0, 3).flatten(1, 2)  # Hkv G*tokens d
            y = torch.baddbmm(
                chunk.mask.expand(w.kv_heads, -1, -1), q, k_row[:, : chunk.stop].transpose(1, 2), alpha=w.scale
            )
            y = torch.bmm(torch.softmax(y, -1), v_row[:, : chunk.stop])
            out[chunk.rows] = y.view(w.kv_heads, groups, -1, w.head_width).permute(2, 0, 1, 3)
        return out.view(n, -1)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), with one weight or one for each row."""
    if weight.dim() == 1:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return functional.rms_norm(x, x.shape[-1:], None, epsilon) * weight


def _per_head(weight: Tensor) -> Tensor:
    """Let one weight per row act on each head of the row."""
    return weight if weight.dim() == 1 else weight.unsqueeze(1)


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn [N, heads, d] by the rotary angles of each row (arXiv 2104.09864); halves of d are pairs.

    The first half of `sines` [N, 1, d] is negative: the second half of x turns into the first with a minus sign.
    """
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
