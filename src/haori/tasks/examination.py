"""Rows made ready to measure, and what a model scores on them: what a task gives to an evaluation.

Plain data; intervals, paired differences, reports and plots are made of it in `haori.evaluation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from haori.core.records import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from haori.metrics.statistics import Statistic

__all__ = [
    "USUAL",
    "Answer",
    "AnsweredRow",
    "Counts",
    "Examination",
    "ExaminedRow",
    "LabelChoice",
    "MeasureOptions",
    "Measured",
    "MetricGroup",
    "Sample",
    "Scores",
    "TextLosses",
    "Turn",
    "spread",
]

T = TypeVar("T")
Counts: TypeAlias = tuple[tuple[int, ...], ...]
MetricGroup: TypeAlias = Literal["label", "perplexity", "generation"]
LabelChoice: TypeAlias = Sequence[str] | Literal["auto", "none"] | None


@dataclass(frozen=True)
class MeasureOptions:
    """What can be asked of a measurement; a task refuses what has no meaning for it.

    Attributes:
        labels: `auto` finds out whether this is a label task, a list gives its labels, `none` says that it is not.
        metrics: Groups to measure; the task's own choice by default.
        max_new_tokens: Most tokens of a generated answer.
        generate_rows: Most rows to generate answers for, spread over the data.
        control_tokens: How control tokens in messages are read.
    """

    labels: LabelChoice = "auto"
    metrics: Sequence[MetricGroup] | None = None
    max_new_tokens: int = 64
    generate_rows: int = 100
    control_tokens: Literal["text", "allow"] = "text"


USUAL = MeasureOptions()
"""What is measured where nothing else is asked for."""


class Turn(NamedTuple):
    """One message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    """What one system did on one row; None where it was not asked.

    Attributes:
        nll: Summed negative log-likelihood of the row's trained tokens, in nats.
        label: The label chosen.
        text: The text generated.
        score: How sure it is of it: the probability of the label, the margin between two answers.
        scores: The probability of each label in the order of the labels, or the reward of each answer of the row.
    """

    nll: float | None = None
    label: str | None = None
    text: str | None = None
    score: float | None = None
    scores: tuple[float, ...] | None = None


class AnsweredRow(Protocol):
    """A row with what a model did on it, as kept on disk: metrics are computed from such rows again."""

    @property
    def reference(self) -> str | None:
        """Return the answer it should get."""

    @property
    def tokens(self) -> int:
        """Return how many things of it carry a label."""

    @property
    def nll(self) -> float | None:
        """Return as in `Answer`, and so for what follows."""

    @property
    def label(self) -> str | None:
        """Return the label chosen."""

    @property
    def text(self) -> str | None:
        """Return the text generated."""

    @property
    def score(self) -> float | None:
        """Return how sure the model was."""

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Return the probability of each label, or the reward of each answer."""


@dataclass(frozen=True)
class Sample:
    """One prompt with the reference and both systems' answers."""

    index: int
    origin: str
    prompt: tuple[Turn, ...]
    reference: str
    adapter: Answer
    base: Answer | None


class ExaminedRow(Protocol):
    """A row that can be measured."""

    @property
    def index(self) -> int:
        """Return its place in the data given."""

    @property
    def origin(self) -> str:
        """Return where it came from, such as `reviews.jsonl:12`."""

    @property
    def reference(self) -> str | None:
        """Return the answer it should get, for people; None where there is no such thing."""

    @property
    def trained_tokens(self) -> int:
        """Return how many things of it carry a label."""


@dataclass(frozen=True)
class Measured:
    """A metric of one system: its value as the libraries give it, and the same as a statistic over rows."""

    value: float
    statistic: "Statistic"


@dataclass(frozen=True)
class Scores:
    """What one system scored.

    Attributes:
        metrics: By name, as in `metrics.kinds.KINDS`.
        answers: What it did on each row, by the row's index.
        right: Which rows it got right or wrong, by the metric that is their mean.
        confusion: Rows by reference (down) and answer (across), in the order of the labels.
        kept: What the task keeps to show samples without asking the model again.
    """

    metrics: Mapping[str, Measured]
    answers: Mapping[int, Answer]
    right: "Mapping[str, NDArray[np.bool_]]" = field(default_factory=dict)
    confusion: Counts | None = None
    kept: Any = None


class Examination(Protocol):
    """Rows ready to be measured; `score` is called once for each system, in evaluation mode and without gradients."""

    @property
    def rows(self) -> Sequence[ExaminedRow]:
        """Return the rows that can be measured."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels to choose among; empty where there are none."""

    def score(self, model: "nn.Module", system: str) -> Scores:
        """Measure one system; `system` (adapter, base) is for progress bars."""

    def notes(self, adapter: Scores, base: Scores | None) -> list[str]:
        """Return how the figures were made, in plain sentences, rows left out among them."""

    def sampled(self, scores: Scores) -> Sequence[ExaminedRow]:
        """Return the rows that can be shown side by side."""

    def prompt(self, row: Any) -> tuple[Turn, ...]:
        """Return what a row asks, for people."""

    def answers(self, model: "nn.Module", system: str, rows: Sequence[Any], scores: Scores) -> list[Answer]:
        """Return what a system answers to the rows that are shown."""

    def sample_note(self) -> str:
        """Return how the answers that are shown were made; empty where there is nothing to say."""


class TextLosses(Record):
    """Per passage: its kind, the summed negative log-likelihood in nats, and the number of tokens it sums over."""

    kinds: tuple[str, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]


def spread(count: int, among: Sequence[T]) -> list[T]:
    """Return up to `count` of the items, evenly spread, always the same ones."""
    if count >= len(among):
        return list(among)
    return [among[(2 * place + 1) * len(among) // (2 * count)] for place in range(count)]
