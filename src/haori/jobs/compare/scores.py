"""From measured rows to scores: means over seeds, their spread, and paired differences with intervals.

Every model was measured on the same rows. Rows are drawn again together for all seeds and for both sides of a
difference, so an interval tells what other test rows would change; what other seeds would change is the spread.
"""

import statistics
from collections.abc import Sequence

from haori.core.errors import MismatchError
from haori.evaluation.bootstrap import intervals
from haori.jobs.compare.records import Difference, Measured, Score
from haori.metrics.labels import f1_sums
from haori.metrics.likelihood import perplexity_sums
from haori.metrics.statistics import Statistic, mean_of, mean_sums
from haori.metrics.text import bleu_sums, chrf_sums

__all__ = ["main_metric", "scores_of"]

_ORDER = ("accuracy", "macro_f1", "chrf", "bleu", "perplexity")


def scores_of(runs: Sequence[Measured], against: dict[str, Sequence[Measured]], *, seed: int = 0) -> dict[str, Score]:
    """Score one method.

    Args:
        runs: Its runs, one per seed.
        against: Other methods' runs by name; differences are these runs minus those.
        seed: Of the bootstrap.

    Raises:
        MismatchError: Two runs were measured on different rows.
    """
    _require_same_rows([*runs, *(run for other in against.values() for run in other)])
    own = _statistics(runs)
    others = {name: _statistics(other) for name, other in against.items() if other}
    scores = {}
    for metric in _ORDER:
        if metric not in own:
            continue
        mean = mean_of(own[metric])
        found = intervals(mean, seed=seed)
        each = tuple(one.value for one in own[metric])
        scores[metric] = Score(
            value=mean.value,
            low=found.value.low if found else None,
            high=found.value.high if found else None,
            each=each,
            spread=statistics.stdev(each) if len(each) > 1 else None,
            against={name: _difference(mean, mean_of(other[metric]), seed) for name, other in others.items()},
        )
    return scores


def main_metric(scores: dict[str, Score]) -> str:
    """Return the metric that a comparison is judged by: accuracy of a label task, else perplexity."""
    return next(name for name in ("accuracy", "perplexity", *_ORDER) if name in scores)


def _difference(mean: Statistic, other: Statistic, seed: int) -> Difference:
    found = intervals(mean, other, seed=seed)
    low, high = found.difference if found and found.difference else (None, None)
    return Difference(value=mean.value - other.value, low=low, high=high)


def _require_same_rows(runs: Sequence[Measured]) -> None:
    scored = [[(row.origin, row.reference, row.tokens) for row in run.rows] for run in runs]
    if any(rows != scored[0] for rows in scored):
        raise MismatchError("The runs were scored on different rows: the test data changed; compare anew.")


def _statistics(runs: Sequence[Measured]) -> dict[str, list[Statistic]]:
    found: dict[str, list[Statistic]] = {}
    for run in runs:
        for name, statistic in _statistics_of(run).items():
            found.setdefault(name, []).append(statistic)
    return found


def _statistics_of(run: Measured) -> dict[str, Statistic]:
    """Return the metrics that were measured, as statistics over rows."""
    found: dict[str, Statistic] = {}
    labelled = [row for row in run.rows if row.label is not None]
    if labelled:
        answers, references = [str(row.label) for row in labelled], [str(row.reference) for row in labelled]
        found["accuracy"] = mean_sums([a == r for a, r in zip(answers, references, strict=True)])
        found["macro_f1"] = f1_sums(answers, references, run.labels)
    written = [row for row in run.rows if row.text is not None]
    if written:
        texts, references = [str(row.text) for row in written], [str(row.reference) for row in written]
        found["chrf"] = chrf_sums(texts, references)
        found["bleu"] = bleu_sums(texts, references)
    scored = [row for row in run.rows if row.nll is not None]
    if scored:
        found["perplexity"] = perplexity_sums([row.nll or 0.0 for row in scored], [row.tokens for row in scored])
    return found
