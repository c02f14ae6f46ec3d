"""Token ids for which a base has no embedding: its tokenizer knows more tokens than its weights do."""

from collections.abc import Iterable
from typing import Any

__all__ = ["embedding_rows", "no_embedding"]


def embedding_rows(config: Any) -> int | None:
    """Return the tokens that a model of this configuration has embeddings for; None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def no_embedding(tokenizer: Any, ids: Iterable[int], rows: int | None) -> str | None:
    """Say which token has no embedding among `rows` of them; None where all have one."""
    token = max(ids, default=-1)
    if rows is None or token < rows:
        return None
    text = tokenizer.convert_ids_to_tokens(int(token))
    return (
        f"the token {text!r} has the id {token}, but this base has embeddings for ids 0 to {rows - 1} only: tokens "
        "were added to its tokenizer and not to its weights; take them out of the text, or use a base whose embeddings "
        "were resized (model.resize_token_embeddings(len(tokenizer)))"
    )
