"""Metrics of preference pairs: how often, and by how much, the chosen answer is rewarded above the rejected one."""

import numpy as np
import numpy.typing as npt

from haori.core.errors import VerificationError
from haori.metrics.statistics import Statistic, mean_sums

__all__ = ["preference_statistics"]


def preference_statistics(chosen: npt.ArrayLike, rejected: npt.ArrayLike) -> dict[str, Statistic]:
    """Return preference accuracy (share of pairs with margin > 0), mean margin and mean rewards.

    The margin of a pair is the reward of its chosen answer minus that of its rejected one, so with equal rewards, as
    before the first step, no pair is right.

    Args:
        chosen: [n] reward of each pair's chosen answer.
        rejected: [n] reward of its rejected answer.

    Raises:
        VerificationError: A reward is not a finite number.
    """
    good, bad = np.asarray(chosen, float), np.asarray(rejected, float)
    margins = good - bad
    broken = int((~np.isfinite(margins)).sum())
    if broken:
        raise VerificationError(
            f"The model gives rewards that are not numbers on {broken} of {len(margins)} pairs; its weights are "
            "broken (NaN or infinite), so train it again with a lower learning rate."
        )
    return {
        "preference_accuracy": mean_sums(margins > 0),
        "reward_margin": mean_sums(margins),
        "chosen_reward": mean_sums(good),
        "rejected_reward": mean_sums(bad),
    }
