"""Batches hold every row once, stay within their budget, and are as few as rows in this order allow."""

from itertools import zip_longest

from hypothesis import given
from hypothesis import strategies as st

from haori.data.batching import cut_batches, plan_batches

COSTS = st.lists(st.integers(0, 60), max_size=60)


@given(costs=COSTS, budget=st.integers(1, 200))
def test_batches_hold_every_row_once_dearest_first(costs, budget):
    found = plan_batches(costs, budget)
    assert sum(found, []) == sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    assert all(found)


@given(costs=COSTS, budget=st.integers(1, 200))
def test_no_batch_is_over_budget_and_none_ends_early(costs, budget):
    found = plan_batches(costs, budget)
    for batch, following in zip_longest(found, found[1:]):
        dearest = max(costs[row] for row in batch)
        assert len(batch) == 1 or len(batch) * dearest <= budget
        if following is not None:
            assert (len(batch) + 1) * dearest > budget


def test_batches_by_hand():
    assert plan_batches([5, 9, 2, 7], 10) == [[1], [3], [0, 2]]
    assert plan_batches([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]
    assert plan_batches([100, 1, 1], 10) == [[0], [1, 2]]
    assert plan_batches([], 10) == []
    assert plan_batches([0, 0], 1) == [[0, 1]]
    assert cut_batches([3, 1], [0, 2, 0, 6], 12) == [[3, 1]]
    assert cut_batches([3, 1], [0, 2, 0, 6], 11) == [[3], [1]]
