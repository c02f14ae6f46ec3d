"""The three groups of metrics: labels, perplexity, generation. Each measures both systems and words notes.

A group gets examples that it can measure and returns figures with intervals; which groups run is decided by
`evaluation.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from haori.bases import generate
from haori.core.records import Metric
from haori.data.batching import plan_batches
from haori.evaluation.bootstrap import RESAMPLES, intervals, mcnemar
from haori.evaluation.examples import Example, context_length
from haori.evaluation.labels import label_tokens
from haori.evaluation.progress import progress_bar
from haori.evaluation.result import Confusion
from haori.evaluation.scoring import default_budget, score_labels, score_rows
from haori.evaluation.systems import Both, Systems
from haori.metrics.labels import accuracy, confusion_matrix, f1, f1_sums
from haori.metrics.likelihood import perplexity, perplexity_sums
from haori.metrics.statistics import Array, Statistic, mean_sums
from haori.metrics.text import NORMALISATION, bleu, bleu_sums, chrf, chrf_sums, exact_match

__all__ = ["Group", "Part", "Writer", "measure_generation", "measure_labels", "measure_perplexity"]

_DECODE_BUDGETS = 4  # token budgets of prompts and answers decoded together: decoding is bound by memory traffic


@dataclass
class Group:
    """What one group found.

    Attributes:
        answers: Per example, in the order given: a label, a likelihood or a text, from both systems.
        metrics: The figures.
        base_intervals: 95% interval of the base's own figures.
        notes: How they were made.
        confusion: Confusion matrices of a label task.
    """

    answers: Both[Any]
    metrics: dict[str, Metric] = field(default_factory=dict)
    base_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    confusion: Confusion | None = None

    def add(self, name: str, values: Both[float], rows: Both[Statistic], seed: int) -> None:
        """Add a metric: its values as the libraries give them, its intervals by bootstrap over `rows`."""
        found = intervals(rows.adapter, rows.base, resamples=RESAMPLES, seed=seed)
        low, high = found.value if found else (None, None)
        difference_low, difference_high = found.difference if found and found.difference else (None, None)
        self.metrics[name] = Metric(
            value=values.adapter,
            low=low,
            high=high,
            base=values.base,
            difference=None if values.base is None else values.adapter - values.base,
            difference_low=difference_low,
            difference_high=difference_high,
        )
        if found and found.base:
            self.base_intervals[name] = (found.base.low, found.base.high)


class Part(NamedTuple):
    """A group and the examples it measured, in the order of its answers."""

    examples: Sequence[Example]
    group: Group


@dataclass(frozen=True)
class Writer:
    """Lets both systems write greedy answers of at most `max_new_tokens` tokens."""

    systems: Systems
    tokenizer: Any
    max_new_tokens: int

    def fits(self, example: Example) -> bool:
        """Say whether the model's context has room for a whole answer."""
        return len(example.prompt) + self.max_new_tokens <= context_length(self.systems.model)

    def write(self, examples: Sequence[Example], title: str) -> Both[list[str]]:
        """Return one answer per example from each system, stripped; prompts of like length go together."""
        prompts = [example.prompt for example in examples]
        lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]

        def write(model: nn.Module, name: str) -> list[str]:
            answers = [""] * len(prompts)
            budget = _DECODE_BUDGETS * default_budget(model)
            with progress_bar(f"{title}, {name}", len(prompts), "answers") as advance:
                for batch in plan_batches(lengths, budget):
                    asked = [prompts[index] for index in batch]
                    texts = generate(model, self.tokenizer, asked, max_new_tokens=self.max_new_tokens)
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text.strip()
                    advance(len(batch))
            return answers

        return self.systems.on_both(write)


def measure_labels(
    systems: Systems, tokenizer: Any, examples: Sequence[Example], labels: tuple[str, ...], seed: int
) -> Group:
    """Let each system choose among the labels; accuracy, macro and micro F1, confusion matrices."""
    tokens = label_tokens(tokenizer, [example.conversation for example in examples], labels)
    prompts = [example.prompt for example in examples]

    def choose(model: nn.Module, name: str) -> list[str]:
        scores = score_labels(model, prompts, tokens.ids, title=f"Labels, {name}")
        return [labels[place] for place in scores.argmax(axis=1)]

    answers = systems.on_both(choose)
    references = [str(example.reference) for example in examples]
    group = Group(answers)
    right = _both(answers, lambda given: np.array(given) == np.array(references))
    accuracies = _both(answers, lambda given: accuracy(given, references))
    group.add("accuracy", accuracies, _both(right, mean_sums), seed)
    macro = _both(answers, lambda given: f1(given, references, labels, "macro"))
    group.add("macro_f1", macro, _both(answers, lambda given: f1_sums(given, references, labels)), seed)
    micro = _both(answers, lambda given: f1(given, references, labels, "micro"))
    group.add("micro_f1", micro, _both(right, mean_sums), seed)
    matrices = _both(answers, lambda given: confusion_matrix(given, references, labels))
    group.confusion = Confusion(matrices.adapter, matrices.base)
    group.notes = _label_notes(labels, tokens.with_end, right)
    return group


def measure_perplexity(systems: Systems, examples: Sequence[Example], seed: int) -> Group:
    """Measure the likelihood of each row's trained tokens; token-weighted perplexity."""
    rows = [example.row for example in examples]
    scores = systems.on_both(lambda model, name: score_rows(model, rows, title=f"Perplexity, {name}"))
    group = Group(_both(scores, lambda found: found.nll.tolist()))
    group.add(
        "perplexity",
        _both(scores, lambda found: perplexity(found.nll, found.tokens)),
        _both(scores, lambda found: perplexity_sums(found.nll, found.tokens)),
        seed,
    )
    tokens = int(scores.adapter.tokens.sum())
    plain = all(example.reference is None for example in examples)
    what = "tokens" if plain else "tokens of the assistant's messages, end of turn included"
    group.notes = [f"Perplexity: exp(sum of negative log-likelihood / tokens) over {tokens:,} {what}; lower is better."]
    return group


def measure_generation(writer: Writer, examples: Sequence[Example], seed: int) -> Group:
    """Generate one greedy answer per example; exact match, BLEU and chrF against the reference."""
    references = [str(example.reference) for example in examples]
    answers = writer.write(examples, "Answers")
    group = Group(answers)
    equal = _both(answers, lambda given: exact_match(given, references))
    group.add("exact_match", _both(equal, lambda row: float(row.mean())), _both(equal, mean_sums), seed)
    bleu_scores = _both(answers, lambda given: bleu(given, references))
    bleu_rows = _both(answers, lambda given: bleu_sums(given, references))
    group.add("bleu", _both(bleu_scores, lambda score: score.value), bleu_rows, seed)
    chrf_scores = _both(answers, lambda given: chrf(given, references))
    chrf_rows = _both(answers, lambda given: chrf_sums(given, references))
    group.add("chrf", _both(chrf_scores, lambda score: score.value), chrf_rows, seed)
    group.notes = [
        f"Generated answers are greedy, at most {writer.max_new_tokens} tokens long, and cut there.",
        f"Exact match compares after normalisation: {NORMALISATION}.",
        f"BLEU by sacrebleu: {bleu_scores.adapter.signature}. It is 0 where no answer is four words long.",
        f"chrF by sacrebleu: {chrf_scores.adapter.signature}.",
        *_no_width_notes("exact match", equal.adapter),
    ]
    return group


def _both(pair: Both[Any], work: Any) -> Both[Any]:
    return Both(work(pair.adapter), None if pair.base is None else work(pair.base))


def _label_notes(labels: Sequence[str], with_end: bool, right: Both[Any]) -> list[str]:
    end = "with the end of turn, as one label begins another" if with_end else "without the end of turn"
    notes = [
        f"Answers were constrained to {len(labels)} labels ({', '.join(map(repr, labels))}): the answer is the "
        f"label whose tokens have the highest summed log-probability after the prompt, {end}; nothing else counts.",
        "Macro F1 is the mean over labels; with one answer per row micro F1 equals accuracy.",
    ]
    if right.base is not None:
        test = mcnemar(right.adapter, right.base)
        notes.append(
            f"Accuracy, McNemar's exact test: {test.only_first} rows only the adapter got right, "
            f"{test.only_second} only the base; p = {_p_value(test.p_value)} if both were equally good."
        )
    return notes + _no_width_notes("accuracy", right.adapter)


def _no_width_notes(title: str, right: Array) -> list[str]:
    """Warn where all rows came out alike: a bootstrap then knows no uncertainty."""
    if right.any() and not right.all():
        return []
    points = 100 * min(1.0, 3 / len(right))
    return [
        f"All rows came out alike, so the bootstrap interval of the adapter's {title} has no width; by the rule of "
        f"three the true figure may still be {points:.1f} points away."
    ]


def _p_value(value: float) -> str:
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
