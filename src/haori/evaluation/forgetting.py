"""What a model forgot: the rise of its loss on text that has nothing to do with the task.

Loss is in nats per token of plain text, so chat templates play no part. The same passages are scored before and after
training, which Biderman et al. 2024 (arXiv 2405.09673) do with benchmarks. It shows what became less likely, not which
skills were lost.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from haori.core.errors import MismatchError
from haori.core.records import Record
from haori.evaluation.bootstrap import intervals
from haori.metrics.likelihood import loss_sums
from haori.metrics.statistics import mean_of
from haori.tasks.examination import TextLosses

__all__ = [
    "Change",
    "Forgetting",
    "forgetting_between",
]


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
