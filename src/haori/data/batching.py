"""Which rows share a batch: those of like cost, so that little of it is padding, within a budget.

A row's cost is what padding makes all rows of its batch cost: its tokens, for example. So a batch costs its number of
rows times the cost of its dearest row. Training, scoring and the server's encoder plan their batches with this.
"""

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["cut_batches", "plan_batches"]


def plan_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Return all rows in batches, dearest first; rows of equal cost keep their order.

    Args:
        costs: Of each row.
        budget: What a batch may cost; a row that costs more is a batch of its own.
    """
    order = np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable")
    return cut_batches(order.tolist(), costs, budget)


def cut_batches(rows: Iterable[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows that are sorted already, dearest first, into batches; as `plan_batches`."""
    batches: list[list[int]] = []
    dearest = 0
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * dearest > budget:
            batches.append([])
            dearest = int(costs[row])
        batches[-1].append(row)
    return batches
