"""The prefix cache: keys and values of earlier prompts, for prompts that begin alike under the same adapters.

Blocks of 32 tokens, each known by (whose prompt it was, the adapters' content ids and strengths, all tokens up to its
end). No owner finds another's blocks: the time to the first token would tell what others have asked. An adapter that
is retrained under its old name has another content id, so a block is never taken for another adapter's. The blocks lie
side by side in one tensor: allocated one by one, they would fragment the process's memory.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.serve.request import AdapterMix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK", "PrefixCache"]

BLOCK = 32


class PrefixCache:
    """Blocks within a budget of bytes; the one used longest ago goes first.

    Args:
        budget_bytes: Memory for blocks; 0 keeps none.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._memory: Tensor | None = None
        self.queries = 0
        self.hits = 0

    def find(self, owner: str, mix: AdapterMix, tokens: Sequence[int]) -> "list[Tensor]":
        """Return the blocks of the longest known beginning of a prompt, which leaves at least its last token.

        They are valid until the next `keep`.
        """
        found: list[Tensor] = []
        for key in _keys(owner, mix, tokens[: len(tokens) - 1]):
            if self._memory is None or key not in self._slots:
                break
            self._slots.move_to_end(key)
            found.append(self._memory[self._slots[key]])
        self.queries += len(tokens)
        self.hits += BLOCK * len(found)
        return found

    def missing(self, owner: str, mix: AdapterMix, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the first token and the key of each whole block of a prompt that is not kept yet."""
        if not self._budget:
            return []
        keys = _keys(owner, mix, tokens)
        return [(i * BLOCK, key) for i, key in enumerate(keys) if key not in self._slots]

    def keep(self, key: bytes, block: "Tensor") -> None:
        """Keep a copy of a block, in place of another if there is no room. All blocks are of one shape.

        A block with NaN or infinity in it is not kept: every request that found it would fail.
        """
        if not math.isfinite(float(block.sum())):
            return
        if self._memory is None:
            room = self._budget // (block.numel() * block.element_size())
            self._memory = block.new_empty(room, *block.shape)
        room = len(self._memory)
        if not room:
            return
        slot = len(self._slots)
        if slot == room:
            _, slot = self._slots.popitem(last=False)
        self._memory[slot] = block
        self._slots[key] = slot


def _keys(owner: str, mix: AdapterMix, tokens: Sequence[int]) -> list[bytes]:
    """Return a key for each whole block: a hash of the owner, the mix and every token up to the block's end."""
    import hashlib
    from array import array

    digest = hashlib.blake2b(repr((owner, mix)).encode(), digest_size=16)
    keys = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest.update(array("q", tokens[start : start + BLOCK]).tobytes())
        keys.append(digest.digest())
    return keys
