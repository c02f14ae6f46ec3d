"""How likely a model finds the tokens of a prompt, each given those before it; gathered while the prompt is read."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from haori.core.errors import HaoriError
from haori.serve.request import TokenLogprob
from haori.serve.sampling.logprobs import token_logprobs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PromptScores"]


class PromptScores:
    """Log-probabilities of a prompt's tokens from the second on. Logits come by chunks, in order, and are not kept.

    Args:
        prompt: Token ids.
        top: How many of the likeliest tokens to name at each position.
        targets: Ids to name too, by position.
    """

    def __init__(
        self, prompt: Sequence[int], top: int, targets: Mapping[int, Sequence[int]] = MappingProxyType({})
    ) -> None:
        self._prompt = prompt
        self._targets = targets
        self._top = top
        self._found: list[TokenLogprob] = []

    @property
    def complete(self) -> bool:
        """Say whether all are known."""
        return len(self._found) == len(self._prompt) - 1

    @property
    def found(self) -> tuple[TokenLogprob, ...]:
        """Return those that are known."""
        return tuple(self._found)

    def take(self, start: int, logits: "Tensor") -> None:
        """Take the logits after some tokens; those of tokens that are scored already are ignored.

        Args:
            start: The first token's position in the prompt.
            logits: (N, V), in any floating type.

        Raises:
            HaoriError: They are not numbers.
        """
        first, stop = len(self._found), min(start + len(logits), len(self._prompt) - 1)
        if first >= stop:
            return
        if start > first:
            raise HaoriError(f"The logits after token {first} of the prompt were left out; this is a fault of Haori.")
        logits = logits[first - start : stop - start]
        if not bool(logits.amax(-1).isfinite().all()):
            raise HaoriError(
                "The model's logits for this prompt are not numbers; its adapter or strength may be at fault."
            )
        nexts = self._prompt[first + 1 : stop + 1]
        named = [self._targets.get(position, ()) for position in range(first + 1, stop + 1)]
        self._found += token_logprobs(logits, nexts, [self._top] * len(nexts), ranked=True, named=named)
