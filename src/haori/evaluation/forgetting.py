"""What a model forgot: the rise of its loss on text that has nothing to do with the task.

Loss is in nats per token of plain text, so chat templates play no part; the shipped passages are of several kinds
(general_text/ATTRIBUTION.md). The same passages are scored before and after training, which Biderman et al. 2024
(arXiv 2405.09673) do with benchmarks. It shows what became less likely, not which skills were lost.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from haori.core.errors import DataError, MismatchError
from haori.core.records import Record
from haori.data import read_conversations
from haori.data.section import TextSection
from haori.evaluation.bootstrap import intervals
from haori.evaluation.examples import context_length
from haori.metrics.likelihood import loss_sums
from haori.metrics.statistics import mean_of

__all__ = [
    "Change",
    "Forgetting",
    "GeneralText",
    "TextLosses",
    "forgetting_between",
    "general_texts",
    "own_texts",
    "text_losses",
]

_LONGEST = 512  # tokens of a passage that are scored


class GeneralText(NamedTuple):
    """A passage: its kind (`knowledge`, `code`, ...), the text, where it is from, under which licence."""

    kind: str
    text: str
    source: str
    licence: str | None


class TextLosses(Record):
    """Per passage: its kind, the summed negative log-likelihood in nats, and the number of tokens it sums over."""

    kinds: tuple[str, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]


class Change(Record):
    """Loss in nats per token before and after, and the difference with its paired 95% interval over passages."""

    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    passages: int
    tokens: int


class Forgetting(Record):
    """The change over all passages, and over those of each kind."""

    whole: Change
    kinds: dict[str, Change]


def general_texts() -> tuple[GeneralText, ...]:
    """Return the passages that come with the package, about 16,000 tokens."""
    lines = files("haori.evaluation").joinpath("general_text/passages.jsonl").read_text(encoding="utf-8").splitlines()
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
    from haori.evaluation.scoring import score_rows
    from haori.evaluation.systems import Systems

    longest = min(_LONGEST, context_length(model))
    rows = [_Row(list(tokenizer(text.text)["input_ids"][:longest])) for text in texts]
    if not any(len(row.input_ids) > 1 for row in rows):
        raise DataError("No passage of general text has two tokens; give text to measure forgetting on.")
    scores = Systems(model, against_base=False).on_both(lambda one, _: score_rows(one, rows, title="General text"))
    return TextLosses(
        kinds=tuple(text.kind for text in texts),
        nll=tuple(scores.adapter.nll.tolist()),
        tokens=tuple(int(count) for count in scores.adapter.tokens),
    )


def forgetting_between(before: TextLosses, after: TextLosses | Sequence[TextLosses], *, seed: int = 0) -> Forgetting:
    """Compare the loss on the same passages before and after training.

    The difference is after minus before, so forgetting is positive. Its interval is a paired bootstrap over passages.

    Args:
        before: Of the base.
        after: Of the trained model, or of several trained alike, whose losses are averaged.
        seed: Of the bootstrap.

    Raises:
        MismatchError: The passages are not the same.
    """
    trained = [after] if isinstance(after, TextLosses) else list(after)
    if any((one.kinds, one.tokens) != (before.kinds, before.tokens) for one in trained):
        raise MismatchError("The general text before and after training is not the same; measure both again.")
    kinds = np.array(before.kinds)
    named = {kind: _change(before, trained, kinds == kind, seed) for kind in dict.fromkeys(before.kinds)}
    return Forgetting(whole=_change(before, trained, np.ones(len(kinds), dtype=bool), seed), kinds=named)


class _Row(NamedTuple):
    input_ids: list[int]

    @property
    def labels(self) -> list[int]:
        """Return the labels: every token is scored."""
        return self.input_ids


def _change(before: TextLosses, trained: Sequence[TextLosses], chosen: Any, seed: int) -> Change:
    tokens = np.array(before.tokens)[chosen]
    base = loss_sums(np.array(before.nll)[chosen], tokens)
    after = mean_of([loss_sums(np.array(one.nll)[chosen], tokens) for one in trained])
    found = intervals(after, base, seed=seed)
    low, high = found.difference if found and found.difference else (None, None)
    return Change(
        before=base.value,
        after=after.value,
        difference=after.value - base.value,
        low=low,
        high=high,
        passages=int(chosen.sum()),
        tokens=int(tokens.sum()),
    )
