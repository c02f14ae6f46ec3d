"""Which rows go into which optimizer step: bucketed by cost, within a budget, the same for the same seed.

The plan of an epoch depends only on what the rows cost, the seed and the epoch, so a resumed run can continue at
any step without having stored an iterator. Knows nothing about tensors.
"""

import math
from collections.abc import Sequence

import numpy as np

from haori.data.batching import cut_batches
from haori.tasks.recipe import TrainingSection

__all__ = ["Step", "count_steps", "epoch_steps", "plan_epoch", "share_of_process"]

Step = list[list[int]]
"""One optimizer step: microbatches of row numbers."""

_BUCKET_STEPS = 32


def plan_epoch(costs: Sequence[int], *, step_budget: int, microbatch_budget: int, seed: int, epoch: int) -> list[Step]:
    """Return the optimizer steps of one epoch; every row occurs exactly once.

    Rows are shuffled, cut into windows of about 32 steps, sorted by cost within a window, cut into steps whose
    padded cost (rows x dearest) stays within `step_budget`, and the steps are shuffled. A step larger than
    `microbatch_budget` is cut again into microbatches. A row dearer than a budget is a batch of its own.
    """
    sizes = np.asarray(costs)
    if not len(sizes):
        return []
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes))
    window = max(1, round(_BUCKET_STEPS * step_budget / max(1.0, float(sizes.mean()))))
    steps: list[Step] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-sizes[part], kind="stable")]
        for rows in cut_batches(part.tolist(), costs, step_budget):
            steps.append(_split_evenly(rows, int(sizes[rows[0]]), microbatch_budget))
    return [steps[i] for i in random.permutation(len(steps))]


def epoch_steps(costs: Sequence[int], training: TrainingSection, epoch: int) -> list[Step]:
    """Return the optimizer steps of an epoch, as a resolved recipe wants them."""
    budgets = training.budgets()
    return plan_epoch(
        costs,
        step_budget=budgets.step,
        microbatch_budget=budgets.microbatch,
        seed=training.seed,
        epoch=epoch,
    )


def count_steps(costs: Sequence[int], training: TrainingSection) -> int:
    """Return the optimizer steps of a whole run that nothing ends early."""
    assert training.epochs != "auto"
    planned = sum(len(epoch_steps(costs, training, epoch)) for epoch in range(training.epochs))
    return min(planned, training.max_steps or planned)


def share_of_process(step: Step, process: int, processes: int) -> list[list[int] | None]:
    """Return the microbatches of a step that one of several processes computes.

    Every process gets equally many; `None` marks a turn without rows, in which the process takes part in the
    gradient exchange with nothing of its own.
    """
    turns: list[list[int] | None] = list(step)
    turns += [None] * (-len(turns) % processes)
    return turns[process::processes]


def _split_evenly(rows: list[int], longest: int, budget: int) -> Step:
    """Split a step into as few microbatches as the budget allows, of about equal numbers of rows."""
    rows_each = max(1, budget // longest)
    return [part.tolist() for part in np.array_split(rows, math.ceil(len(rows) / rows_each))]
