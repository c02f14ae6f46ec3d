"""Keys and values of the sequences under way, one contiguous row for each, never concatenated.

Rows of one capacity (128 tokens, 192, 256, 384, 512 ... up to the context length) form a shelf without gaps, so that
one batched product attends to all sequences of a shelf. It covers whole rows, and masks what is not written yet: a view
of a part of each row would not be contiguous, and would be copied. What an earlier sequence wrote stays until it is
overwritten; see `LlamaRunner` for what happens if that is NaN or infinity.

    keys, values   [rows, Hkv, capacity, d]

A sequence that outgrows its row moves to the next shelf; it is copied twice per doubling. When a sequence ends, the
last row of its shelf moves into the gap. Sequences that decode come before those whose prompt is being prefilled.
A shelf keeps its empty rows until another needs the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CacheShape", "KVCache", "Shelf"]

_SMALLEST_ROW = 128
_FIRST_ROWS = 4


@dataclass(frozen=True)
class CacheShape:
    """Sizes that a model gives its cache."""

    layers: int
    kv_heads: int
    head_width: int
    context_length: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_width * self.dtype.itemsize


class Shelf:
    """The rows of one capacity. `order` names the sequence in each row; the first `decoding` of them decode."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.order: list[int] = []
        self.decoding = 0
        self.rows = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.addresses = torch.empty(2, shape.layers, dtype=torch.long)  # where keys, values of each layer begin

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all layers."""
        return self.capacity * self.shape.token_bytes

    def grow(self, rows: int) -> None:
        """Resize to `rows` rows, keeping what is in those that are used."""
        try:
            self.keys = self._grown(self.keys, rows)
            self.values = self._grown(self.values, rows)
        finally:  # if memory ran out, only some layers have grown
            both = self.keys, self.values
            self.rows = min(min(map(len, tensors), default=0) for tensors in both)
            if self.rows:
                self.addresses = torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in both])

    def _grown(self, old: list[Tensor], rows: int) -> list[Tensor]:
        s, held = self.shape, len(self.order)
        new = []
        for layer in range(s.layers):
            # Zeros: a masked position must hold a finite number, as zero times NaN is NaN.
            tensor = torch.zeros(rows, s.kv_heads, self.capacity, s.head_width, dtype=s.dtype, device=s.device)
            if held:
                tensor[:held] = old[layer][:held]
                old[layer] = tensor  # layer by layer, so that at most one is held twice
            new.append(tensor)
        return new

    def clear_behind(self, positions: Tensor) -> None:
        """Put zeros behind the given position in each of the first rows."""
        behind = torch.arange(self.capacity, device=positions.device) > positions[:, None]  # rows T
        for tensor in (*self.keys, *self.values):
            tensor[: len(positions)].masked_fill_(behind[:, None, :, None], 0.0)

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def swap(self, one: int, other: int) -> None:
        """Swap two rows."""
        for tensor in (*self.keys, *self.values):
            held = tensor[one].clone()
            tensor[one] = tensor[other]
            tensor[other] = held


class KVCache:
    """The cache of one model.

    Args:
        shape: Sizes.
        budget_bytes: The rows may take so much memory together.
    """

    def __init__(self, shape: CacheShape, budget_bytes: int) -> None:
        self.shape = shape
        self._budget = budget_bytes
        self._shelves: dict[int, Shelf] = {}
        self._shelf_of: dict[int, Shelf] = {}
        self._row_of: dict[int, int] = {}
        self._next = 0

    @property
    def budget_bytes(self) -> int:
        """Memory that rows may take together."""
        return self._budget

    @property
    def used_bytes(self) -> int:
        """Memory of the rows in use."""
        return sum(len(shelf.order) * shelf.row_bytes for shelf in self._shelves.values())

    @property
    def shelves(self) -> Sequence[Shelf]:
        """The shelves with rows in use, smallest rows first."""
        return [self._shelves[size] for size in sorted(self._shelves) if self._shelves[size].order]

    def open(self, tokens: int) -> int | None:
        """Open a slot with room for so many tokens; None if there is no memory for it now."""
        shelf = self._shelf(tokens)
        if not self._add_row(shelf):
            return None
        sequence = self._next
        self._next += 1
        self._append(sequence, shelf)
        return sequence

    def extend(self, sequence: int, tokens: int) -> bool:
        """Make room for so many tokens of a sequence; False if there is no memory for that now."""
        old = self._shelf_of[sequence]
        if tokens <= old.capacity:
            return True
        new = self._shelf(tokens)
        if not self._add_row(new, leaving=old.row_bytes):
            return False
        row, was_decoding = self._row_of[sequence], self._row_of[sequence] < old.decoding
        target = len(new.order)
        for layer in range(self.shape.layers):
            new.keys[layer][target, :, : old.capacity] = old.keys[layer][row]
            new.values[layer][target, :, : old.capacity] = old.values[layer][row]
        self._remove(sequence)
        self._append(sequence, new)
        if was_decoding:
            self.decode(sequence)
        return True

    def close(self, sequence: int) -> None:
        """Free a slot."""
        self._remove(sequence)

    def decode(self, sequence: int) -> None:
        """Move a sequence whose prompt is prefilled to those that decode."""
        shelf, row = self._shelf_of[sequence], self._row_of[sequence]
        if row >= shelf.decoding:
            self._exchange(shelf, row, shelf.decoding)
            shelf.decoding += 1

    def locate(self, sequence: int) -> tuple[Shelf, int]:
        """Return the shelf and the row of a sequence."""
        return self._shelf_of[sequence], self._row_of[sequence]

    def take(self, sequence: int, start: int, stop: int) -> Tensor:
        """Copy some tokens' keys and values out: shape [2, layers, Hkv, stop - start, d]."""
        shelf, row = self.locate(sequence)
        return torch.stack(
            [torch.stack([layer[row, :, start:stop] for layer in kind]) for kind in (shelf.keys, shelf.values)]
        )

    def put(self, sequence: int, start: int, block: Tensor) -> None:
        """Copy what `take` returned into a sequence, from the token `start` on."""
        shelf, row = self.locate(sequence)
        stop = start + block.shape[3]
        for layer in range(self.shape.layers):
            shelf.keys[layer][row, :, start:stop] = block[0, layer]
            shelf.values[layer][row, :, start:stop] = block[1, layer]

    def _shelf(self, tokens: int) -> Shelf:
        capacity = _SMALLEST_ROW
        while capacity < tokens:
            capacity = capacity * 3 // 2 if capacity.bit_count() == 1 else capacity // 3 * 4
        capacity = max(min(capacity, self.shape.context_length), tokens)
        if capacity not in self._shelves:
            self._shelves[capacity] = Shelf(self.shape, capacity)
        return self._shelves[capacity]

    def _add_row(self, shelf: Shelf, leaving: int = 0) -> bool:
        """Make sure that the shelf has a free row; False if the budget does not allow it."""
        if self.used_bytes + shelf.row_bytes - leaving > self._budget:
            return False
        if len(shelf.order) == shelf.rows:
            wanted = shelf.rows * 2 or _FIRST_ROWS
            if wanted * shelf.row_bytes > self._free_beside(shelf):
                for other in self._shelves.values():
                    if other is not shelf and other.rows > len(other.order):
                        other.grow(len(other.order))
            shelf.grow(max(len(shelf.order) + 1, min(wanted, self._free_beside(shelf) // shelf.row_bytes)))
        return True

    def _free_beside(self, shelf: Shelf) -> int:
        """Return the bytes that other shelves leave to this one."""
        return self._budget - sum(
            other.rows * other.row_bytes for other in self._shelves.values() if other is not shelf
        )

    def _append(self, sequence: int, shelf: Shelf) -> None:
        self._shelf_of[sequence] = shelf
        self._row_of[sequence] = len(shelf.order)
        shelf.order.append(sequence)

    def _remove(self, sequence: int) -> None:
        shelf, row = self._shelf_of.pop(sequence), self._row_of[sequence]
        if row < shelf.decoding:
            shelf.decoding -= 1
            self._move(shelf, shelf.decoding, row)
            row = shelf.decoding
        self._move(shelf, len(shelf.order) - 1, row)
        shelf.order.pop()
        del self._row_of[sequence]

    def _move(self, shelf: Shelf, source: int, target: int) -> None:
        """Move the row `source` to `target`, and overwrite what was there."""
        if source != target:
            shelf.copy(source, target)
            moved = shelf.order[source]
            shelf.order[target] = moved
            self._row_of[moved] = target

    def _exchange(self, shelf: Shelf, one: int, other: int) -> None:
        if one != other:
            shelf.swap(one, other)
            shelf.order[one], shelf.order[other] = shelf.order[other], shelf.order[one]
            for row in (one, other):
                self._row_of[shelf.order[row]] = row
