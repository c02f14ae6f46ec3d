"""Text that has nothing to do with a task, and how likely a model finds it: what forgetting is measured on.

The shipped passages are of several kinds (general_text/ATTRIBUTION.md).
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from haori.core.errors import DataError
from haori.data import read_conversations
from haori.data.section import TextSection
from haori.tasks.causal_lm.examples import context_length
from haori.tasks.examination import TextLosses

__all__ = ["GeneralText", "general_texts", "own_texts", "text_losses"]

_LONGEST = 512  # tokens of a passage that are scored


class GeneralText(NamedTuple):
    """A passage: its kind (`knowledge`, `code`, ...), the text, where it is from, under which licence."""

    kind: str
    text: str
    source: str
    licence: str | None


def general_texts() -> tuple[GeneralText, ...]:
    """Return the passages that come with the package, about 16,000 tokens."""
    file = files("haori.tasks.causal_lm").joinpath("general_text/passages.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(GeneralText(**json.loads(line)) for line in lines)


def own_texts(path: str) -> tuple[GeneralText, ...]:
    """Read a file or folder of the user's as general text: one passage per row, roles left out.

    Raises:
        DataError: It cannot be read or has no rows.
    """
    rows, _ = read_conversations(TextSection(path=path))
    return tuple(GeneralText("own", row.body, row.origin, None) for row in rows)


def text_losses(model: Any, tokenizer: Any, texts: Sequence[GeneralText]) -> TextLosses:
    """Sum -log p(token | tokens before it) over each passage, cut at 512 tokens.

    The first token of a passage has nothing before it and is not scored. Log-softmax is in fp32, a few rows at a time.

    Args:
        model: A causal language model, plain or with adapters attached; its mode is put back afterwards.
        tokenizer: Its tokenizer.
        texts: The passages.

    Raises:
        DataError: No passage has two tokens.
        VerificationError: A likelihood is not a finite number.
    """
    from haori.tasks.causal_lm.scoring import score_rows

    longest = min(_LONGEST, context_length(model))
    rows = [_Row(list(tokenizer(text.text)["input_ids"][:longest])) for text in texts]
    if not any(len(row.input_ids) > 1 for row in rows):
        raise DataError("No passage of general text has two tokens; give text to measure forgetting on.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        scores = score_rows(model, rows, title="General text")
    finally:
        for module, training in modes.items():
            module.training = training
    return TextLosses(
        kinds=tuple(text.kind for text in texts),
        nll=tuple(scores.nll.tolist()),
        tokens=tuple(int(count) for count in scores.tokens),
    )


class _Row(NamedTuple):
    input_ids: list[int]

    @property
    def labels(self) -> list[int]:
        """Return the labels: every token is scored."""
        return self.input_ids
