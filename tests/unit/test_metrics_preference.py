"""Metrics of preference pairs by hand."""

import numpy as np
import pytest

from haori.core.errors import VerificationError
from haori.metrics.preference import preference_statistics


def test_figures_by_hand() -> None:
    found = preference_statistics([1.0, 0.5, -2.0, 0.0], [0.5, 0.5, -1.0, -3.0])
    values = {name: statistic.value for name, statistic in found.items()}
    assert values == pytest.approx(
        {"preference_accuracy": 2 / 4, "reward_margin": 2.5 / 4, "chosen_reward": -0.5 / 4, "rejected_reward": -0.75}
    )
    counts = np.array([[0.0, 0.0, 3.0, 1.0]])
    assert found["reward_margin"].resampled(counts) == pytest.approx([0.0])
    assert found["preference_accuracy"].resampled(counts) == pytest.approx([1 / 4])


def test_equal_rewards_are_not_right() -> None:
    assert preference_statistics(np.zeros(3), np.zeros(3))["preference_accuracy"].value == 0.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_rewards_are_a_sentence(broken) -> None:
    with pytest.raises(VerificationError, match="not numbers on 1 of 2 pairs"):
        preference_statistics([broken, 1.0], [0.0, 0.0])
