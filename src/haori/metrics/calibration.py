"""Whether probabilities mean what they say: calibration error and log loss."""

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, Sums, mean_sums

__all__ = ["CALIBRATION_BINS", "calibration_sums", "log_loss_sums"]

CALIBRATION_BINS = 15


def calibration_sums(confidence: npt.ArrayLike, right: npt.ArrayLike) -> Sums:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599) over 15 bins of equal width.

    ECE = sum over bins of |sum of (right - confidence)| / decisions; bin m holds confidences in (m/15, (m+1)/15].

    Args:
        confidence: [n] probability of each row's decision, or [n, D] of its D decisions.
        right: [n] or [n, D], whether the decision was right.
    """
    sure, hits = np.asarray(confidence, float), np.asarray(right, float)
    sure, hits = sure.reshape(len(sure), -1), hits.reshape(len(hits), -1)  # [n, D]
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.stack([((hits - sure) * (bins == one)).sum(axis=1) for one in range(CALIBRATION_BINS)], axis=1)
    decisions = np.full((len(sure), 1), sure.shape[1], float)

    def score(sums: Array) -> Array:
        return np.asarray(np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1])

    return Sums(np.concatenate([gaps, decisions], axis=1), score)


def log_loss_sums(probabilities: npt.ArrayLike) -> Sums:
    """Log loss: the mean of -log p over rows, in nats; p is kept from 0 by float64's epsilon, as in scikit-learn.

    Args:
        probabilities: [n] probability that the row's own label was given.
    """
    return mean_sums(-np.log(np.maximum(np.asarray(probabilities, float), np.finfo(float).eps)))
