"""Captions as tokens of fixed length, and what of a caption is longer than that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["compact_states", "cut_text", "cut_within", "padded_tokens"]


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


def cut_within(tokenizer: Any, prompt: str, caption: str, length: int) -> str:
    """Return the end of a caption that is lost where the prompt around it is cut to `length` tokens."""
    found = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    places = found["offset_mapping"]
    start = prompt.rfind(caption)
    if len(places) <= length or start < 0:
        return ""
    return caption[max(0, places[length][0] - start) :].strip()


def compact_states(states: "Tensor", mask: "Tensor", skipped: int = 0) -> "tuple[Tensor, Tensor]":
    """Move the states of true tokens to the front, without the first `skipped` of them, and zeros behind.

    Args:
        states: [B, T, D].
        mask: [B, T], not zero for true tokens.
        skipped: Tokens of a template that stand before every caption.

    Returns:
        States [B, T - skipped, D] and their mask, bool.
    """
    import torch

    length = states.shape[1] - skipped
    found = [values[true][skipped:] for values, true in zip(states, mask.bool(), strict=True)]
    padded = [torch.nn.functional.pad(values, (0, 0, 0, length - len(values))) for values in found]
    counts = torch.tensor([len(values) for values in found], device=states.device)
    return torch.stack(padded), torch.arange(length, device=states.device) < counts[:, None]
