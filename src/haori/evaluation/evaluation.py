"""Measure an adapter against its base on conversations: which metrics apply, then one result.

Assumes a PEFT model over a causal language model and rows already read. Reading files, attaching adapters and
storing the result are other packages' work.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from haori.core.errors import DataError, InputError
from haori.core.records import BaseReference, DataReference, Metric
from haori.core.token_ids import embedding_rows
from haori.data import ControlTokens, Conversation
from haori.evaluation.bootstrap import RESAMPLES
from haori.evaluation.examples import Example, context_length, prepare, spread
from haori.evaluation.groups import Part, Writer, measure_generation, measure_labels, measure_perplexity
from haori.evaluation.labels import check_labels, detect_labels
from haori.evaluation.result import Answer, EvaluationResult, RowResult
from haori.evaluation.samples import make_samples
from haori.evaluation.systems import Both, Systems

__all__ = ["MetricGroup", "evaluate_adapter"]

MetricGroup: TypeAlias = Literal["label", "perplexity", "generation"]
LabelChoice: TypeAlias = Sequence[str] | Literal["auto", "none"] | None
_FEW_ROWS = 30


def evaluate_adapter(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    data_reference: DataReference,
    against_base: bool = True,
    labels: LabelChoice = "auto",
    metrics: Sequence[MetricGroup] | None = None,
    samples: int = 3, max_new_tokens: int = 64, generate_rows: int = 100, seed: int = 0,
    adapter: str = "adapter", base: BaseReference | None = None, base_model: nn.Module | None = None,
    control_tokens: ControlTokens = "text",
) -> EvaluationResult:  # fmt: skip
    """Measure an adapter, and its base beside it, on the same rows.

    Args:
        model: A PeftModel with the adapter active, over a causal language model.
        tokenizer: The base's tokenizer, with the adapter's chat template.
        conversations: The rows; the last assistant message of each is the reference answer.
        data_reference: Identity of the rows.
        against_base: Measure the base too, on the same model with the adapter off.
        labels: `auto` finds out whether this is a label task, a list gives its labels, `none` says that it is not.
        metrics: Groups to measure; by default perplexity, and labels for a label task or generation for others.
        samples: Side-by-side answers to show.
        max_new_tokens: Most tokens of a generated answer.
        generate_rows: Most rows to generate answers for, spread over the data.
        seed: Seed of the bootstrap. Nothing else is random.
        adapter: The adapter's name, for the report.
        base: The base's identity, for the report.
        base_model: The base alone, for adapters that cannot be switched off (trained biases, PiSSA).
        control_tokens: How control tokens in messages are read.

    Raises:
        InputError: No row can be measured, labels or metrics do not fit the rows, or the base cannot be had.
        VerificationError: A likelihood is not a number.
    """
    started = time.perf_counter()
    writer = Writer(Systems(model, against_base=against_base, base_model=base_model), tokenizer, max_new_tokens)
    examples, notes = prepare(
        tokenizer, conversations, context_length(model), embedding_rows(model.config), control_tokens
    )
    answered = [example for example in examples if example.reference is not None]
    plan = _plan(labels, metrics, answered)
    found = _measure(writer, examples, answered, plan, generate_rows=generate_rows, seed=seed)
    shown, sample_notes = make_samples(writer, answered, samples, written=found.generation, labelled=found.label)
    return EvaluationResult(
        adapter=adapter,
        against=None if not against_base else base.name if base else "base",
        base=base,
        data=data_reference,
        metrics=found.metrics,
        base_intervals=found.base_intervals,
        labels=plan.labels if found.label else (),
        confusion=found.label.group.confusion if found.label else None,
        samples=shown,
        rows=_rows(examples, found, against_base),
        notes=(*notes, *found.notes, *sample_notes, *_interval_notes(len(examples), against_base, seed)),
        seconds=time.perf_counter() - started,
    )


class _Plan(NamedTuple):
    """What to measure: the labels (none: no label task), where they came from, and the groups of metrics."""

    labels: tuple[str, ...]
    how: str
    groups: Sequence[str]


@dataclass
class _Found:
    """The groups that were measured."""

    label: Part | None = None
    perplexity: Part | None = None
    generation: Part | None = None

    @property
    def parts(self) -> list[Part]:
        """Return the measured ones."""
        return [part for part in (self.label, self.perplexity, self.generation) if part is not None]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return the figures of all groups."""
        return {name: metric for part in self.parts for name, metric in part.group.metrics.items()}

    @property
    def base_intervals(self) -> dict[str, tuple[float, float]]:
        """Return the base's intervals of all groups."""
        return {name: ends for part in self.parts for name, ends in part.group.base_intervals.items()}

    @property
    def notes(self) -> list[str]:
        """Return how the figures of all groups were made."""
        return [note for part in self.parts for note in part.group.notes]


def _measure(
    writer: Writer,
    examples: Sequence[Example],
    answered: Sequence[Example],
    plan: _Plan,
    *,
    generate_rows: int,
    seed: int,
) -> _Found:
    """Measure the planned groups, each on the rows that it can measure."""
    found = _Found()
    trained = [example for example in examples if example.trained_tokens]
    if "perplexity" in plan.groups and not trained:
        raise DataError("No row has a trained token to measure perplexity on; leave it out of metrics.")
    chosen = spread(max(0, generate_rows), [example for example in answered if writer.fits(example)])
    if "generation" in plan.groups and not chosen:
        raise DataError(
            f"No row leaves room to generate {writer.max_new_tokens} tokens: lower max_new_tokens, raise "
            "generate_rows above 0, or leave 'generation' out of metrics."
        )
    if "label" in plan.groups:
        group = measure_labels(writer.systems, writer.tokenizer, answered, plan.labels, seed)
        group.notes.insert(0, plan.how)
        found.label = Part(answered, group)
    if "perplexity" in plan.groups:
        found.perplexity = Part(trained, measure_perplexity(writer.systems, trained, seed))
    if "generation" in plan.groups:
        found.generation = _generation(writer, chosen, len(answered), seed)
    return found


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


def _generation(writer: Writer, chosen: Sequence[Example], answered: int, seed: int) -> Part:
    """Measure generation on the chosen rows of all that have a reference."""
    group = measure_generation(writer, chosen, seed)
    if len(chosen) < answered:
        group.notes.append(
            f"Answers were generated for {len(chosen)} of {answered} rows, spread evenly, to save time; "
            "exact match, BLEU and chrF are of those rows."
        )
    return Part(chosen, group)


def _rows(examples: Sequence[Example], found: _Found, against_base: bool) -> tuple[RowResult, ...]:
    """Return the per-row table."""
    measured = (("label", found.label), ("nll", found.perplexity), ("text", found.generation))
    adapter: dict[int, dict[str, Any]] = {example.index: {} for example in examples}
    base: dict[int, dict[str, Any]] = {example.index: {} for example in examples}
    for name, part in measured:
        for place, example in enumerate(part.examples if part else ()):
            given = part.group.answers if part else Both((), None)
            adapter[example.index][name] = given.adapter[place]
            if given.base is not None:
                base[example.index][name] = given.base[place]
    return tuple(
        RowResult(
            index=example.index,
            origin=example.origin,
            reference=example.reference,
            tokens=example.trained_tokens,
            adapter=Answer(**adapter[example.index]),
            base=Answer(**base[example.index]) if against_base else None,
        )
        for example in examples
    )


def _interval_notes(rows: int, against_base: bool, seed: int) -> list[str]:
    if rows < 2:
        return ["One row was measured: there are no intervals."]
    notes = [f"Intervals are 95% percentile bootstrap over rows, {RESAMPLES} resamples, seed {seed}."]
    if against_base:
        notes[0] += " A difference is adapter minus base on the same resampled rows; an interval without 0 is clear."
    if rows < _FEW_ROWS:
        notes.append(f"Only {rows} rows were measured: intervals from so few rows are too narrow; use 100 or more.")
    return notes
