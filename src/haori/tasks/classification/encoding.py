"""From text to token ids, as training and answers both encode it.

The tokenizer puts its special tokens around a text and between a pair. Where it puts nothing between the two, as those
of decoders do, a line break stands there. A word's label belongs to the first token of the word.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.bases.quiet import quiet_transformers
from haori.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "TextEncoder", "default_length", "first_tokens", "longest_input"]

_LONGEST = 512


class Encoded(NamedTuple):
    """Token ids of one row.

    Attributes:
        input_ids: The ids.
        token_type_ids: Which text of a pair each belongs to, where the base wants to know.
        truncated: Tokens were cut off.
        first_of: Place of the first token of each word; None for a word without tokens, or beyond the cut.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    truncated: bool
    first_of: tuple[int | None, ...] = ()


class TextEncoder:
    """Encodes texts, pairs and words for one base.

    Args:
        tokenizer: The base's.
        max_length: Longest row in tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        alone, both = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        self._joins = alone == both

    def encode(self, text: str, pair: str | None = None, words: Sequence[str] | None = None) -> Encoded:
        """Encode one row, cut to the longest length.

        Args:
            text: The text; the words joined by spaces where they are given.
            pair: The second text of a pair.
            words: The words whose first tokens are wanted.

        Raises:
            InputError: The first tokens of words are wanted of a tokenizer that does not say what its tokens stand for.
        """
        if pair is not None and self._joins:
            text, pair = f"{text}\n{pair}", None
        options: dict[str, Any] = {"return_attention_mask": False}
        if words is not None:
            if not self.tokenizer.is_fast:
                raise InputError(
                    "The tokenizer of this base does not say which part of a text its tokens stand for, so words "
                    "cannot be labelled; use a base with a tokenizer.json."
                )
            options["return_offsets_mapping"] = True
        with quiet_transformers():  # it warns of rows that are cut below
            found = self.tokenizer(text, pair, **options)
            truncated = len(found["input_ids"]) > self.max_length
            if truncated:
                found = self.tokenizer(text, pair, truncation=True, max_length=self.max_length, **options)
        kinds = found.get("token_type_ids")
        places = () if words is None else first_tokens(words, found["offset_mapping"])
        return Encoded(list(found["input_ids"]), None if kinds is None else list(kinds), truncated, places)


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[int | None, ...]:
    """Return the place of each word's first token.

    Args:
        words: The words, which stand in the text with one space between.
        offsets: Where in the text each token begins and ends; special tokens have an empty span.
    """
    text = " ".join(words)
    starts: list[int | None] = []  # of each token, its first character that is no space
    for begin, end in offsets:
        inside = next((place for place in range(begin, end) if not text[place].isspace()), None)
        starts.append(inside)
    found: list[int | None] = []
    place, token = 0, 0
    for word in words:
        end = place + len(word)
        while token < len(starts) and ((start := starts[token]) is None or start < place):
            token += 1
        begins = token < len(starts) and (start := starts[token]) is not None and start < end
        found.append(token if begins else None)
        place = end + 1
    return tuple(found)


def longest_input(model: Any, tokenizer: "PreTrainedTokenizerBase", context_length: int) -> int:
    """Return the most tokens that a base reads.

    Args:
        model: The base; a skeleton without weights will do.
        tokenizer: Its tokenizer.
        context_length: What its configuration says; RoBERTa and its kin keep a few of these places for padding.
    """
    kept = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(context_length - max(kept, default=0), int(tokenizer.model_max_length))


def default_length(longest: int) -> int:
    """Return what `auto` means for the longest row."""
    return min(_LONGEST, longest)
