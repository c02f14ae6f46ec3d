"""Captions as tokens of fixed length, and what of a caption is longer than that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cut_text", "padded_tokens"]


def padded_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> "tuple[Tensor, Tensor]":
    """Return ids and attention mask [B, T] of texts, cut or padded to T = `length` tokens."""
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt",
        return_attention_mask=True,
    )  # fmt: skip
    return found["input_ids"], found["attention_mask"]


def cut_text(tokenizer: Any, text: str, length: int) -> str:
    """Return the end of a text that does not fit into `length` tokens, special ones counted; empty if all fits."""
    kept = length - tokenizer.num_special_tokens_to_add()
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = found["offset_mapping"]
    return text[places[kept][0] :].strip() if len(places) > kept else ""
