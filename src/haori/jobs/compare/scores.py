"""From measured rows to scores: means over seeds, their spread, and paired differences with intervals.

Every model was measured on the same rows. Rows are drawn again together for all seeds and for both sides of a
difference, so an interval tells what other test rows would change; what other seeds would change is the spread.
"""

import statistics
from collections.abc import Sequence

from haori.core.errors import MismatchError
from haori.evaluation.bootstrap import intervals
from haori.jobs.compare.records import Difference, Measured, Score
from haori.metrics.statistics import Statistic, mean_of
from haori.tasks.task import Task

__all__ = ["main_metric", "scores_of"]


def scores_of(
    task: Task, runs: Sequence[Measured], against: dict[str, Sequence[Measured]], *, seed: int = 0
) -> dict[str, Score]:
    """Score one method.

    Args:
        task: What was learnt.
        runs: Its runs, one per seed.
        against: Other methods' runs by name; differences are these runs minus those.
        seed: Of the bootstrap.

    Raises:
        MismatchError: Two runs were measured on different rows.
    """
    _require_same_rows([*runs, *(run for other in against.values() for run in other)])
    own = _statistics(task, runs)
    others = {name: _statistics(task, other) for name, other in against.items() if other}
    scores = {}
    for metric in own:
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
    """Return the metric to judge by: accuracy where there are labels, else perplexity, else the task's first."""
    return next(name for name in ("accuracy", "perplexity", *scores) if name in scores)


def _difference(mean: Statistic, other: Statistic, seed: int) -> Difference:
    found = intervals(mean, other, seed=seed)
    low, high = found.difference if found and found.difference else (None, None)
    return Difference(value=mean.value - other.value, low=low, high=high)


def _require_same_rows(runs: Sequence[Measured]) -> None:
    scored = [[(row.origin, row.reference, row.tokens) for row in run.rows] for run in runs]
    if any(rows != scored[0] for rows in scored):
        raise MismatchError("The runs were scored on different rows: the test data changed; compare anew.")


def _statistics(task: Task, runs: Sequence[Measured]) -> dict[str, list[Statistic]]:
    found: dict[str, list[Statistic]] = {}
    for run in runs:
        for name, statistic in task.statistics(run.rows, run.labels).items():
            found.setdefault(name, []).append(statistic)
    return found
