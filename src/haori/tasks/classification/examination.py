"""Labelled rows made ready to measure: what a classifier answers, and every metric of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from haori.core.errors import DataError, InputError
from haori.metrics.classification import (
    ClassificationMetrics,
    labels_above,
    multi_label_metrics,
    single_label_metrics,
    token_metrics,
    top_labels,
)
from haori.tasks.classification.encoding import Encoded, TextEncoder, default_length, longest_input
from haori.tasks.classification.label_names import LabelNames
from haori.tasks.classification.labelled_row import LabelledRow
from haori.tasks.classification.scoring import head_of, probabilities
from haori.tasks.examination import USUAL, Answer, AnsweredRow, Measured, MeasureOptions, Scores, Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from haori.metrics.statistics import Statistic

__all__ = ["ClassificationExamination", "MeasuredRows", "statistics_of"]


class MeasuredRows(tuple[LabelledRow, ...]):
    """Rows to measure on, with the longest row of the training."""

    max_length: int | None = None


@dataclass(frozen=True)
class _Row:
    """A row that can be measured; `reference` is its label, or its labels as a JSON list."""

    index: int
    origin: str
    reference: str
    trained_tokens: int
    row: LabelledRow
    encoded: Encoded


class ClassificationExamination:
    """Labelled rows ready to be measured; see `haori.tasks.examination.Examination`.

    Args:
        model: The classifier: its labels and the longest text it reads are looked at.
        tokenizer: The base's.
        rows: The rows.
        options: What was asked for.

    Raises:
        InputError: Something was asked for that a classifier has not.
        DataError: A row has a label that the classifier does not have.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        rows: Sequence[LabelledRow],
        options: MeasureOptions,
    ) -> None:
        if options.labels not in ("auto", None) or options.metrics is not None:
            raise InputError("A classifier is measured with its own labels and all metrics of them; leave those out.")
        if options.max_new_tokens != USUAL.max_new_tokens:
            raise InputError("A classifier writes no text, so a longest answer (--max-tokens) has no meaning for it.")
        if not rows:
            raise DataError("There is no row to measure.")
        self.head = head_of(model)
        self.labels = self.head.labels
        self._tokenizer = tokenizer
        context = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        longest = longest_input(model, tokenizer, int(context))
        limit = getattr(rows, "max_length", None) or default_length(longest)
        encoder, names = TextEncoder(tokenizer, limit), LabelNames(self.labels, self.labels)
        self.rows: list[_Row] = []
        self._truncated = 0
        self._wordless: list[str] = []
        for index, given in enumerate(rows):
            row = names.named(given)
            self._check_kind(row)
            encoded = encoder.encode(row.text, row.pair, row.words)
            self._truncated += encoded.truncated
            count = 1 if row.words is None else sum(place is not None for place in encoded.first_of)
            if count:
                self.rows.append(_Row(index, row.origin, self._reference(row, encoded), count, row, encoded))
            else:
                self._wordless.append(row.origin)
        if not self.rows:
            raise DataError(f"No row can be measured: none of {len(rows)} has a word with a token of this base.")
        self._limit = limit

    def _check_kind(self, row: LabelledRow) -> None:
        of_words = self.head.kind == "token_classification"
        if of_words != (row.words is not None):
            raise DataError(
                f"{row.origin}: the classifier labels {'words' if of_words else 'whole texts'}, and the row has "
                f"{'a label for its text' if of_words else 'a label for each word'}."
            )
        if not of_words and not self.head.multi_label and len(row.labels) != 1:
            raise DataError(f"{row.origin}: the classifier gives a text one label, and the row has {len(row.labels)}.")

    def _reference(self, row: LabelledRow, encoded: Encoded) -> str:
        if row.words is not None:
            seen = zip(row.labels, encoded.first_of, strict=True)
            return _as_list([label for label, place in seen if place is not None])
        return _as_list(row.labels) if self.head.multi_label else row.labels[0]

    def score(self, model: "nn.Module", system: str) -> Scores:
        """Ask one system for all rows, and measure what it answers."""
        found = probabilities(
            model, self._tokenizer, [row.encoded for row in self.rows], title=f"Classifying, {system}"
        )
        answers = {row.index: self._answer(shares) for row, shares in zip(self.rows, found, strict=True)}
        measured = self._measure(found)
        statistics = measured.statistics | measured.by_label
        right = {}
        if self.head.kind == "sequence_classification":
            name = "exact_match" if self.head.multi_label else "accuracy"
            given = [answers[row.index].label == row.reference for row in self.rows]
            right[name] = np.array(given)
        return Scores(
            metrics={name: Measured(statistic.value, statistic) for name, statistic in statistics.items()},
            answers=answers,
            right=right,
            confusion=measured.confusion,
            kept=measured,
        )

    def _answer(self, shares: "NDArray[np.float64]") -> Answer:
        if self.head.kind == "token_classification":
            seen = shares[~np.isnan(shares[:, 0])]
            return Answer(text=_as_list(top_labels(seen, self.labels)))
        scores = tuple(float(share) for share in shares)
        if self.head.multi_label:
            return Answer(label=_as_list(labels_above(shares[None], self.labels)[0]), scores=scores)
        return Answer(label=top_labels(shares[None], self.labels)[0], score=float(shares.max()), scores=scores)

    def _measure(self, found: "list[NDArray[np.float64]]") -> ClassificationMetrics:
        references = [row.reference for row in self.rows]
        if self.head.kind == "token_classification":
            answers = [str(self._answer(shares).text) for shares in found]
            return token_metrics([*map(_from_list, answers)], [*map(_from_list, references)], self.labels)
        if self.head.multi_label:
            return multi_label_metrics(np.stack(found), [*map(_from_list, references)], self.labels)
        return single_label_metrics(np.stack(found), references, self.labels)

    def notes(self, adapter: Scores, base: Scores | None) -> list[str]:
        """Return how figures are defined, and what was cut."""
        measured: ClassificationMetrics = adapter.kept
        cut = [f"Rows longer than {self._limit} tokens, cut as in training: {self._truncated:,}."]
        left_out = []
        if self._wordless:
            why = f"have no word with a token of this base and were left out (the first: {self._wordless[0]})"
            left_out = [f"{len(self._wordless)} of {len(self._wordless) + len(self.rows)} rows {why}."]
        return [*left_out, *(cut if self._truncated else []), *measured.notes]

    def sampled(self, scores: Scores) -> Sequence[_Row]:
        """Return all rows: the answers are known."""
        return self.rows

    def prompt(self, row: _Row) -> tuple[Turn, ...]:
        """Return the text, or the pair."""
        turns = [Turn("text", row.row.text)]
        return tuple(turns if row.row.pair is None else [*turns, Turn("second text", row.row.pair)])

    def answers(self, model: "nn.Module", system: str, rows: Sequence[_Row], scores: Scores) -> list[Answer]:
        """Return what the system answered, with how sure it was."""
        return [_for_people(scores.answers[row.index]) for row in rows]

    def sample_note(self) -> str:
        """Say nothing: the answers are those that were measured."""
        return ""


def statistics_of(rows: Sequence[AnsweredRow], labels: Sequence[str]) -> "dict[str, Statistic]":
    """Return the metrics of rows with answers, as they are kept; the most telling first.

    Args:
        rows: With probabilities of labels, or with the labels of words as JSON lists.
        labels: In the order of the probabilities.
    """
    asked = [row for row in rows if row.reference is not None]
    if not asked:
        return {}
    references = [str(row.reference) for row in asked]
    if asked[0].scores is None:
        answers = [_from_list(str(row.text)) for row in asked]
        return token_metrics(answers, [*map(_from_list, references)], labels).statistics
    shares = np.array([row.scores for row in asked])
    if all(reference in labels for reference in references):
        return single_label_metrics(shares, references, labels).statistics
    return multi_label_metrics(shares, [*map(_from_list, references)], labels).statistics


def _for_people(answer: Answer) -> Answer:
    if answer.label is None or answer.score is None:
        return Answer(label=answer.label, text=answer.text or answer.label)
    return Answer(label=answer.label, text=f"{answer.label} ({answer.score:.1%})", score=answer.score)


def _as_list(labels: Sequence[str]) -> str:
    return json.dumps(list(labels), ensure_ascii=False)


def _from_list(text: str) -> list[str]:
    return [str(label) for label in json.loads(text)]
