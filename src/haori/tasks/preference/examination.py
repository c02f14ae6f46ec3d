"""Preferences made ready to measure: which of two answers a model finds likelier, and by how much.

An answer's reward is the mean log-probability of its tokens, so that the adapter and the base both have one, and long
answers are not punished. Judged answers are ranked by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from haori.core.errors import DataError, InputError
from haori.core.token_ids import embedding_rows, no_embedding
from haori.data.conversation import said
from haori.data.rendered_row import RenderedRow, count_trained, render_row
from haori.metrics.preference import preference_statistics
from haori.metrics.ranking import auroc, average_precision
from haori.metrics.statistics import Array, Statistic
from haori.tasks.causal_lm.examples import Example, context_length
from haori.tasks.causal_lm.metric_groups import Writer
from haori.tasks.causal_lm.scoring import score_rows
from haori.tasks.examination import Answer, AnsweredRow, Measured, MeasureOptions, Scores, Turn
from haori.tasks.preference.pairs import Judged
from haori.tasks.preference.reading import Preferred

__all__ = ["PreferenceExamination", "statistics_of"]

_VERDICTS = {True: "good", False: "bad"}


@dataclass(frozen=True)
class _Row:
    """A pair, or a judged answer, with its answers in tokens."""

    index: int
    preference: Preferred
    sides: tuple[RenderedRow, ...]

    @property
    def origin(self) -> str:
        return self.preference.prompt.origin

    @property
    def reference(self) -> str:
        """The chosen answer's text; of a judged answer the verdict."""
        if isinstance(self.preference, Judged):
            return _VERDICTS[self.preference.desirable]
        return said(self.preference.chosen.messages[-1]).strip()

    @property
    def trained_tokens(self) -> int:
        return count_trained(self.sides[0].labels)

    @property
    def example(self) -> Example:
        """The prompt, to be answered anew."""
        side = self.sides[0]
        prompt = side.input_ids[: side.prompt_length]
        return Example(self.index, self.origin, self.preference.conversations[0], self.reference, prompt, side)


@dataclass(frozen=True)
class _Likelihoods:
    """Summed log-probabilities [n, sides] of one system, and the means over an answer's tokens."""

    total: Array
    mean: Array


class PreferenceExamination:
    """Preferences ready to be measured; see `haori.tasks.examination.Examination`.

    Args:
        model: Any of the systems: its context length and number of embeddings are looked at.
        tokenizer: The base's tokenizer, with the adapter's chat template.
        preferences: Pairs, or judged answers.
        options: What was asked for.

    Raises:
        InputError, DataError: No row can be measured, or the options have no meaning for preferences.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, model: Any, tokenizer: Any, preferences: Sequence[Preferred], options: MeasureOptions) -> None:
        if options.labels not in ("auto", "none", None) or options.metrics is not None:
            raise InputError("Labels and groups of metrics have no meaning for the task preference; leave them out.")
        if len({type(preference) for preference in preferences}) > 1:
            raise DataError("Pairs and judged answers cannot be measured together; give files of one kind.")
        longest = context_length(model)
        self.rows: list[_Row] = []
        self._left_out: list[str] = []
        long: list[str] = []
        for index, preference in enumerate(preferences):
            sides = [render_row(tokenizer, side, "assistant", options.control_tokens)
                     for side in preference.conversations]  # fmt: skip
            ids = [token for side in sides for token in side.input_ids]
            if max(len(side.input_ids) for side in sides) > longest:
                long.append(preference.prompt.origin)
            elif (lacking := no_embedding(tokenizer, ids, embedding_rows(model.config))) is not None:
                raise DataError(f"{preference.prompt.origin}: {lacking}.")
            else:
                self.rows.append(_Row(index, preference, tuple(sides)))
        if long:
            self._left_out = [f"{len(long)} of {len(preferences)} rows are longer than the model's {longest:,} tokens "
                              f"and were left out (the first: {long[0]})."]  # fmt: skip
        if not self.rows:
            raise DataError(f"No row can be measured. {' '.join(self._left_out)}".strip())
        self.judged = isinstance(preferences[0], Judged)
        self.writer = Writer(tokenizer, options.max_new_tokens, longest)

    def score(self, model: nn.Module, system: str) -> Scores:
        """Measure how likely the system finds each answer."""
        sides = [side for row in self.rows for side in row.sides]
        found = score_rows(model, sides, title=f"Answers, {system}")
        total = -found.nll.reshape(len(self.rows), -1)
        likelihoods = _Likelihoods(total, total / found.tokens.reshape(total.shape))
        answers: dict[int, Answer] = {}
        for row, sums, means in zip(self.rows, total, likelihoods.mean, strict=True):
            score = means[0] if self.judged else means[0] - means[1]
            rewards = tuple(float(mean) for mean in means)
            answers[row.index] = Answer(nll=float(-sums[0]), score=float(score), scores=rewards)
        if self.judged:
            good = [row.reference == _VERDICTS[True] for row in self.rows]
            found_statistics = _ranking(likelihoods.mean[:, 0], np.array(good))
        else:
            found_statistics = preference_statistics(*likelihoods.mean.T)
        return Scores(
            metrics={name: Measured(statistic.value, statistic) for name, statistic in found_statistics.items()},
            answers=answers,
            right={} if self.judged else {"preference_accuracy": likelihoods.mean[:, 0] > likelihoods.mean[:, 1]},
            kept=likelihoods,
        )

    def notes(self, adapter: Scores, base: Scores | None) -> list[str]:
        """Return rows left out, what a reward is, and how the adapter ranks by what preference losses reward."""
        notes = [*self._left_out]
        notes.append(
            "The reward of an answer is the mean log-probability of its tokens, end of turn included"
            + ("; good answers should have more of it than bad ones." if self.judged else
               ": a pair is right where the chosen answer's is higher.")
        )  # fmt: skip
        if base is not None and not self.judged:
            gained = adapter.kept.total - base.kept.total
            right, pairs = int((gained[:, 0] > gained[:, 1]).sum()), len(self.rows)
            notes.append(
                "By log-probability of the whole answer against the base's, which DPO rewards, the chosen answer is "
                f"ahead in {right} of {pairs} pairs ({right / pairs:.1%})."
            )
        return notes

    def sampled(self, scores: Scores) -> list[_Row]:
        """Return the pairs that leave room to write an answer."""
        return [] if self.judged else [row for row in self.rows if self.writer.fits(row.example)]

    def prompt(self, row: _Row) -> tuple[Turn, ...]:
        """Return the messages of the prompt."""
        return tuple(Turn(message["role"], said(message)) for message in row.preference.prompt.messages)

    def answers(self, model: nn.Module, system: str, rows: Sequence[_Row], scores: Scores) -> list[Answer]:
        """Return what a system answers itself, with its margin between the two answers given."""
        texts = self.writer.write(model, [row.example for row in rows], f"Samples, {system}")
        return [Answer(text=text, score=scores.answers[row.index].score) for row, text in zip(rows, texts, strict=True)]

    def sample_note(self) -> str:
        """Say how sample answers were made."""
        return (
            f"Sample answers are greedy and at most {self.writer.max_new_tokens} tokens long; the reference is the "
            "chosen answer."
        )


def statistics_of(rows: Sequence[AnsweredRow]) -> dict[str, Statistic]:
    """Return the metrics of rows with answers, from the rewards that `score` keeps: two of a pair, one if judged."""
    rewards = np.array([row.scores for row in rows], dtype=float)
    if rewards.shape[1] == 1:
        return _ranking(rewards[:, 0], np.array([row.reference == _VERDICTS[True] for row in rows]))
    return preference_statistics(*rewards.T)


def _ranking(scores: Array, good: Any) -> dict[str, Statistic]:
    return {"auroc": auroc(scores, good), "aupr": average_precision(scores, good)}
