"""Conversations and texts made ready to measure: which metrics apply, what a model scores, what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from torch import nn

from haori.core.errors import DataError, InputError
from haori.core.token_ids import embedding_rows
from haori.data import Conversation
from haori.data.conversation import said
from haori.tasks.causal_lm.examples import Example, context_length, prepare
from haori.tasks.causal_lm.labels import LabelTokens, check_labels, detect_labels, label_tokens
from haori.tasks.causal_lm.metric_groups import (
    Group,
    Writer,
    generation_notes,
    label_notes,
    measure_generation,
    measure_labels,
    measure_perplexity,
    perplexity_notes,
)
from haori.tasks.examination import Answer, LabelChoice, MeasureOptions, MetricGroup, Scores, Turn, spread

__all__ = ["TextExamination"]


class _Plan(NamedTuple):
    """What to measure: the labels (none: no label task), where they came from, and the groups of metrics."""

    labels: tuple[str, ...]
    how: str
    groups: Sequence[str]


@dataclass(frozen=True)
class _Groups:
    """The groups that were measured of one system, each with its examples."""

    label: Group | None
    perplexity: Group | None
    generation: Group | None


class TextExamination:
    """Rows of text ready to be measured; see `haori.tasks.examination.Examination`.

    Args:
        model: Any of the systems: its context length and number of embeddings are looked at.
        tokenizer: The base's tokenizer, with the adapter's chat template.
        conversations: The rows; the last assistant message of each is the reference answer.
        options: What was asked for.

    Raises:
        InputError, DataError: No row can be measured, or labels or metrics do not fit the rows.
    """

    def __init__(
        self, model: Any, tokenizer: Any, conversations: Sequence[Conversation], options: MeasureOptions
    ) -> None:
        longest = context_length(model)
        self.options = options
        self.writer = Writer(tokenizer, options.max_new_tokens, longest)
        examples, self._left_out = prepare(
            tokenizer, conversations, longest, embedding_rows(model.config), options.control_tokens
        )
        self.rows: list[Example] = examples
        self.answered = [example for example in examples if example.reference is not None]
        self.trained = [example for example in examples if example.trained_tokens]
        self._plan = _plan(options.labels, options.metrics, self.answered)
        fitting = [example for example in self.answered if self.writer.fits(example)]
        self.written = spread(max(0, options.generate_rows), fitting)
        self._check()
        self.labels = self._plan.labels if "label" in self._plan.groups else ()
        self._tokens: LabelTokens | None = None
        if self.labels:
            self._tokens = label_tokens(tokenizer, [row.conversation for row in self.answered], self.labels)

    def _check(self) -> None:
        if "perplexity" in self._plan.groups and not self.trained:
            raise DataError("No row has a trained token to measure perplexity on; leave it out of metrics.")
        if "generation" in self._plan.groups and not self.written:
            raise DataError(
                f"No row leaves room to generate {self.writer.max_new_tokens} tokens: lower max_new_tokens, raise "
                "generate_rows above 0, or leave 'generation' out of metrics."
            )

    def score(self, model: nn.Module, system: str) -> Scores:
        """Measure the planned groups, each on the rows that it can measure."""
        groups = self._plan.groups
        found = _Groups(
            measure_labels(model, system, self.answered, self.labels, self._tokens) if self._tokens else None,
            measure_perplexity(model, system, self.trained) if "perplexity" in groups else None,
            measure_generation(model, system, self.writer, self.written) if "generation" in groups else None,
        )
        answers: dict[int, dict[str, Any]] = {row.index: {} for row in self.rows}
        parts = (
            ("label", self.answered, found.label),
            ("nll", self.trained, found.perplexity),
            ("text", self.written, found.generation),
        )
        for name, examples, group in parts:
            for example, answer in zip(examples, group.answers if group else (), strict=group is not None):
                answers[example.index][name] = answer
        measured = [group for _, _, group in parts if group is not None]
        return Scores(
            metrics={name: metric for group in measured for name, metric in group.metrics.items()},
            answers={index: Answer(**fields) for index, fields in answers.items()},
            right={name: right for group in measured for name, right in group.right.items()},
            confusion=found.label.confusion if found.label else None,
            kept=found,
        )

    def notes(self, adapter: Scores, base: Scores | None) -> list[str]:
        """Return rows left out, and how each group was measured."""
        found: _Groups = adapter.kept
        notes = [*self._left_out]
        if found.label and self._tokens:
            notes += [self._plan.how, *label_notes(self.labels, self._tokens)]
        if found.perplexity:
            notes += perplexity_notes(self.trained)
        if found.generation:
            notes += generation_notes(self.writer, found.generation.signatures)
            if len(self.written) < len(self.answered):
                notes.append(
                    f"Answers were generated for {len(self.written)} of {len(self.answered)} rows, spread evenly, to "
                    "save time; exact match, BLEU and chrF are of those rows."
                )
        return notes

    def sampled(self, scores: Scores) -> list[Example]:
        """Return the rows with generated answers, or where there are none those that leave room for one."""
        if scores.kept.generation:
            return self.written
        return [example for example in self.answered if self.writer.fits(example)]

    def prompt(self, row: Example) -> tuple[Turn, ...]:
        """Return the messages before the answer."""
        return tuple(Turn(message["role"], said(message)) for message in row.conversation.messages[:-1])

    def answers(self, model: nn.Module, system: str, rows: Sequence[Example], scores: Scores) -> list[Answer]:
        """Return what was generated, or generate it now, with the labels that were chosen."""
        if scores.kept.generation:
            texts = [scores.answers[row.index].text for row in rows]
        else:
            texts = [*self.writer.write(model, rows, f"Samples, {system}")]
        labels = [scores.answers[row.index].label for row in rows]
        return [Answer(label=label, text=text) for label, text in zip(labels, texts, strict=True)]

    def sample_note(self) -> str:
        """Say how sample answers were generated."""
        return f"Sample answers are greedy and at most {self.writer.max_new_tokens} tokens long."


def _plan(
    labels: LabelChoice,
    metrics: Sequence[MetricGroup] | None,
    answered: Sequence[Example],
) -> _Plan:
    label_set, how = _label_set(labels, answered)
    return _Plan(label_set, how, _groups(metrics, label_set, answered))


def _label_set(labels: LabelChoice, answered: Sequence[Example]) -> tuple[tuple[str, ...], str]:
    """Return the labels (empty: no label task) and where they came from."""
    references = [str(example.reference) for example in answered]
    if labels is None or labels == "none":
        return (), ""
    if not isinstance(labels, str):
        if not references:
            raise DataError("Labels were given, but no row has a reference answer to compare with.")
        return check_labels(labels, references), f"The {len(labels)} labels were given."
    if labels != "auto":
        raise InputError(f"labels={labels!r} is not known: give a list of labels, 'auto' or 'none'.")
    single = all(
        sum(m["role"] == "assistant" for m in row.conversation.messages) == 1 and not row.conversation.uses_tools
        for row in answered
    )
    detected = detect_labels(references) if single and references else None
    if detected is None:
        return (), ""
    return detected, (
        f"Taken for a label task: the {len(references)} reference answers are {len(detected)} short texts that "
        "repeat. Give labels='none' to measure it as free text."
    )


def _groups(
    metrics: Sequence[MetricGroup] | None, label_set: tuple[str, ...], answered: Sequence[Example]
) -> Sequence[str]:
    """Return the groups to measure, after checking that the rows allow them."""
    known = get_args(MetricGroup)
    if metrics is None:
        if label_set:
            return ("label", "perplexity")
        return ("perplexity", "generation") if answered else ("perplexity",)
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise InputError(f"The metrics {list(metrics)!r} are not known: choose among {', '.join(known)}.")
    if "label" in metrics and not label_set:
        raise DataError(
            "Label metrics were asked for, but the reference answers are no label set (2 to 20 short answers "
            "that repeat); give the labels, or leave 'label' out of metrics."
        )
    if "generation" in metrics and not answered:
        raise DataError("Generation metrics were asked for, but no row has a reference answer; use perplexity.")
    return metrics
