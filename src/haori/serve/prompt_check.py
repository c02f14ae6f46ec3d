"""What a prompt must be for an engine to take it; refused before it waits anywhere."""

import itertools
from collections.abc import Iterable, Sequence

from haori.core.errors import InputError

__all__ = ["check_prompt"]


def check_prompt(
    prompt: Sequence[int], context_length: int, vocabulary: int, named: Iterable[Sequence[int]] = ()
) -> None:
    """Refuse a prompt that cannot be answered.

    Args:
        prompt: Token ids.
        context_length: Longest prompt and answer together, in tokens.
        vocabulary: Width of the logits.
        named: Further ids, whose log-probabilities are asked for.

    Raises:
        InputError: It is empty or too long, or a token id is none of the model's.
    """
    count = len(prompt)
    if not count:
        raise InputError("The prompt is empty; give at least one token.")
    if count >= context_length:
        raise InputError(
            f"The prompt has {count:,} tokens, which leaves no room for an answer in a context of "
            f"{context_length:,}; shorten it."
        )
    every = itertools.chain(prompt, *named)
    strange = next((token for token in every if not 0 <= token < vocabulary), None)
    if strange is not None:
        raise InputError(f"The token id {strange} is not in the vocabulary; ids go from 0 to {vocabulary - 1}.")
