"""Keys and values of prompts already read, to be used again by prompts that begin alike under the same adapters.

Blocks of 32 tokens, each known by (the adapters' content ids and strengths, all tokens up to its end). An adapter that
is retrained under its old name has another content id, so a block is never taken for another adapter's.
"""

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
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self.used_bytes = 0
        self.queries = 0
        self.hits = 0

    def find(self, mix: AdapterMix, tokens: Sequence[int]) -> "list[Tensor]":
        """Return the blocks of the longest known beginning of a prompt, which leaves at least its last token."""
        found: list[Tensor] = []
        for key in _keys(mix, tokens[: len(tokens) - 1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        self.queries += len(tokens)
        self.hits += BLOCK * len(found)
        return found

    def missing(self, mix: AdapterMix, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return the first token and the key of each whole block of a prompt that is not kept yet."""
        if not self._budget:
            return []
        keys = _keys(mix, tokens)
        return [(i * BLOCK, key) for i, key in enumerate(keys) if key not in self._blocks]

    def keep(self, key: bytes, block: "Tensor") -> None:
        """Keep a block, making room for it."""
        size = block.numel() * block.element_size()
        if size > self._budget:
            return
        while self.used_bytes + size > self._budget:
            _, gone = self._blocks.popitem(last=False)
            self.used_bytes -= gone.numel() * gone.element_size()
        self._blocks[key] = block
        self.used_bytes += size


def _keys(mix: AdapterMix, tokens: Sequence[int]) -> list[bytes]:
    """Return a key for each whole block: a hash of the mix and every token up to the block's end."""
    import hashlib
    from array import array

    digest = hashlib.blake2b(repr(mix).encode(), digest_size=16)
    keys = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest.update(array("q", tokens[start : start + BLOCK]).tobytes())
        keys.append(digest.digest())
    return keys
