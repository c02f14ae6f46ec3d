"""The three groups of metrics of text: labels, perplexity, generation. Each measures one system.

A group gets examples that it can measure; which groups run is decided by `examination.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from haori.bases import generate
from haori.core.progress_bar import progress_bar
from haori.data.batching import plan_batches
from haori.metrics import labels as label_metrics
from haori.metrics import likelihood, text
from haori.metrics.statistics import Statistic, mean_sums
from haori.tasks.causal_lm.examples import Example
from haori.tasks.causal_lm.labels import LabelTokens
from haori.tasks.causal_lm.scoring import default_budget, score_labels, score_rows
from haori.tasks.examination import AnsweredRow, Counts, Measured

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Group", "Writer", "generation_notes", "label_notes", "measure_generation", "measure_labels",
           "measure_perplexity", "perplexity_notes", "statistics_of"]  # fmt: skip

_DECODE_BUDGETS = 4  # token budgets of prompts and answers decoded together: decoding is bound by memory traffic


@dataclass
class Group:
    """What one group found of one system.

    Attributes:
        answers: Per example, in the order given: a label, a likelihood or a text.
        metrics: The figures.
        right: Right or wrong per example, by the metric that is their mean.
        confusion: Confusion matrix of a label task.
        signatures: How sacrebleu computed its scores.
    """

    answers: Sequence[Any]
    metrics: dict[str, Measured] = field(default_factory=dict)
    right: dict[str, "NDArray[np.bool_]"] = field(default_factory=dict)
    confusion: Counts | None = None
    signatures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Writer:
    """Lets a model write greedy answers of at most `max_new_tokens` tokens; `longest` is its context."""

    tokenizer: Any
    max_new_tokens: int
    longest: int

    def fits(self, example: Example) -> bool:
        """Say whether the model's context has room for a whole answer."""
        return len(example.prompt) + self.max_new_tokens <= self.longest

    def write(self, model: nn.Module, examples: Sequence[Example], title: str) -> list[str]:
        """Return one answer per example, stripped; prompts of like length go together."""
        prompts = [example.prompt for example in examples]
        lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
        answers = [""] * len(prompts)
        with progress_bar(title, len(prompts), "answers") as advance:
            for batch in plan_batches(lengths, _DECODE_BUDGETS * default_budget(model)):
                asked = [prompts[index] for index in batch]
                texts = generate(model, self.tokenizer, asked, max_new_tokens=self.max_new_tokens)
                for index, written in zip(batch, texts, strict=True):
                    answers[index] = written.strip()
                advance(len(batch))
        return answers


def measure_labels(
    model: nn.Module, system: str, examples: Sequence[Example], labels: tuple[str, ...], tokens: LabelTokens
) -> Group:
    """Let the model choose among the labels; accuracy, macro and micro F1, confusion matrix."""
    scores = score_labels(model, [example.prompt for example in examples], tokens.ids, title=f"Labels, {system}")
    answers = [labels[place] for place in scores.argmax(axis=1)]
    references = [str(example.reference) for example in examples]
    right = np.array(answers) == np.array(references)
    group = Group(answers, right={"accuracy": right})
    group.metrics["accuracy"] = Measured(label_metrics.accuracy(answers, references), mean_sums(right))
    macro = label_metrics.f1(answers, references, labels, "macro")
    group.metrics["macro_f1"] = Measured(macro, label_metrics.f1_sums(answers, references, labels))
    micro = label_metrics.f1(answers, references, labels, "micro")
    group.metrics["micro_f1"] = Measured(micro, mean_sums(right))
    group.confusion = label_metrics.confusion_matrix(answers, references, labels)
    return group


def label_notes(labels: Sequence[str], tokens: LabelTokens) -> list[str]:
    """Say how labels were chosen."""
    end = "with the end of turn, as one label begins another" if tokens.with_end else "without the end of turn"
    return [
        f"Answers were constrained to {len(labels)} labels ({', '.join(map(repr, labels))}): the answer is the "
        f"label whose tokens have the highest summed log-probability after the prompt, {end}; nothing else counts.",
        "Macro F1 is the mean over labels; with one answer per row micro F1 equals accuracy.",
    ]


def measure_perplexity(model: nn.Module, system: str, examples: Sequence[Example]) -> Group:
    """Measure the likelihood of each row's trained tokens; token-weighted perplexity."""
    scores = score_rows(model, [example.row for example in examples], title=f"Perplexity, {system}")
    group = Group(scores.nll.tolist())
    value = likelihood.perplexity(scores.nll, scores.tokens)
    group.metrics["perplexity"] = Measured(value, likelihood.perplexity_sums(scores.nll, scores.tokens))
    return group


def perplexity_notes(examples: Sequence[Example]) -> list[str]:
    """Say what perplexity is of."""
    tokens = sum(example.trained_tokens for example in examples)
    plain = all(example.reference is None for example in examples)
    what = "tokens" if plain else "tokens of the assistant's messages, end of turn included"
    return [f"Perplexity: exp(sum of negative log-likelihood / tokens) over {tokens:,} {what}; lower is better."]


def measure_generation(model: nn.Module, system: str, writer: Writer, examples: Sequence[Example]) -> Group:
    """Generate one greedy answer per example; exact match, BLEU and chrF against the reference."""
    references = [str(example.reference) for example in examples]
    answers = writer.write(model, examples, f"Answers, {system}")
    equal = text.exact_match(answers, references)
    group = Group(answers, right={"exact_match": equal})
    group.metrics["exact_match"] = Measured(float(equal.mean()), mean_sums(equal))
    bleu, chrf = text.bleu(answers, references), text.chrf(answers, references)
    group.metrics["bleu"] = Measured(bleu.value, text.bleu_sums(answers, references))
    group.metrics["chrf"] = Measured(chrf.value, text.chrf_sums(answers, references))
    group.signatures = {"bleu": bleu.signature, "chrf": chrf.signature}
    return group


def generation_notes(writer: Writer, signatures: dict[str, str]) -> list[str]:
    """Say how answers were generated and compared."""
    return [
        f"Generated answers are greedy, at most {writer.max_new_tokens} tokens long, and cut there.",
        f"Exact match compares after normalisation: {text.NORMALISATION}.",
        f"BLEU by sacrebleu: {signatures['bleu']}. It is 0 where no answer is four words long.",
        f"chrF by sacrebleu: {signatures['chrf']}.",
    ]


def statistics_of(rows: Sequence[AnsweredRow], labels: Sequence[str]) -> dict[str, Statistic]:
    """Return the metrics of rows that were answered before, as statistics over those that each metric can use."""
    found: dict[str, Statistic] = {}
    labelled = [row for row in rows if row.label is not None]
    if labelled:
        answers, references = [str(row.label) for row in labelled], [str(row.reference) for row in labelled]
        found["accuracy"] = mean_sums([a == r for a, r in zip(answers, references, strict=True)])
        found["macro_f1"] = label_metrics.f1_sums(answers, references, labels)
    written = [row for row in rows if row.text is not None]
    if written:
        texts, references = [str(row.text) for row in written], [str(row.reference) for row in written]
        found["chrf"] = text.chrf_sums(texts, references)
        found["bleu"] = text.bleu_sums(texts, references)
    scored = [row for row in rows if row.nll is not None]
    if scored:
        nll, tokens = [row.nll or 0.0 for row in scored], [row.tokens for row in scored]
        found["perplexity"] = likelihood.perplexity_sums(nll, tokens)
    return found
