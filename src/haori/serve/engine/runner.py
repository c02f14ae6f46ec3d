"""What the engine asks of whatever computes logits. Two answer: `LlamaRunner` (fast) and `ReferenceRunner` (any model).

Each sequence has a slot in the runner's cache. A step takes a run of new tokens from each of several sequences, each
under its own mix of adapters, and returns the logits after the last token of those runs that want them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from haori.serve.request import AdapterMix

if TYPE_CHECKING:
    from torch import Tensor

    from haori.serve.adapters.reading import AdapterWeights

__all__ = ["LOGIT_ROWS", "AdapterBank", "ReadyAdapter", "Run", "Runner", "SequenceCache"]

LOGIT_ROWS = 32
"""Most tokens whose logits exist at once when those after every token of a run are taken."""


@dataclass(frozen=True)
class Run:
    """New tokens of one sequence in one step.

    Attributes:
        sequence: Its slot in the cache, which holds the tokens before.
        start: How many tokens the cache holds of it.
        tokens: The new ones: one when decoding, a chunk of the prompt otherwise.
        adapters: Adapters acting on it; all of them are in the bank.
        wants_logits: Whether the logits after the last one are needed.
        take_logits: Takes the logits after each of them, a few at a time: the position of the first in
            the sequence, and logits (N, V) that are valid during the call. If a step is repeated, it is called again.
    """

    sequence: int
    start: int
    tokens: Sequence[int]
    adapters: AdapterMix
    wants_logits: bool = True
    take_logits: "Callable[[int, Tensor], None] | None" = None


class SequenceCache(Protocol):
    """Keys and values of the sequences under way, within a budget of bytes."""

    def open(self, tokens: int) -> int | None:
        """Open a slot with room for so many tokens; None if there is no memory for it now."""
        ...

    def extend(self, sequence: int, tokens: int) -> bool:
        """Make room for so many tokens; False if there is no memory for that now."""
        ...

    def close(self, sequence: int) -> None:
        """Free a slot."""
        ...

    def take(self, sequence: int, start: int, stop: int) -> "Tensor | None":
        """Return a copy of the keys and values of some tokens, for another sequence; None if that is not possible."""
        ...

    def put(self, sequence: int, start: int, block: "Tensor") -> None:
        """Copy what `take` returned into a sequence."""
        ...

    @property
    def used_bytes(self) -> int:
        """Memory held by sequences under way."""
        ...

    @property
    def budget_bytes(self) -> int:
        """Memory that they may hold together."""
        ...


class ReadyAdapter(Protocol):
    """An adapter as a bank keeps it: its content id, and the memory it takes."""

    @property
    def id(self) -> str:
        """Its content id."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory it takes."""
        ...


class AdapterBank(Protocol):
    """Adapters ready to be multiplied with."""

    def prepare(self, weights: "AdapterWeights") -> ReadyAdapter:
        """Lay out an adapter that was read; unlike the other methods, may be called on any thread.

        Raises:
            MismatchError: The runner cannot apply something in it.
        """
        ...

    def put(self, adapter: Any) -> None:
        """Keep what `prepare` returned; takes no time."""
        ...

    def drop(self, adapter: str) -> None:
        """Forget an adapter and free its memory."""
        ...


class Runner(Protocol):
    """Computes logits. Used from one thread at a time."""

    @property
    def cache(self) -> SequenceCache:
        """Keys and values of the sequences under way."""
        ...

    @property
    def bank(self) -> AdapterBank:
        """Adapters ready for use."""
        ...

    def step(self, runs: Sequence[Run]) -> "Tensor":
        """Compute one step; return logits, shape (runs that want them, V), in their order.

        A step that raised may be asked for again, in parts.
        """
        ...
