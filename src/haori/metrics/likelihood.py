"""Perplexity and loss from summed negative log-likelihoods, weighted by tokens: never a mean of row means."""

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, Sums

__all__ = ["loss_sums", "perplexity", "perplexity_sums"]


def perplexity(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> float:
    """Return the token-weighted perplexity, exp(sum of NLL / sum of tokens): never a mean of row means.

    Args:
        nll: Sum of negative log-likelihoods of each row, in nats.
        tokens: Number of measured tokens of each row.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(np.sum(nll) / np.sum(tokens)))


def perplexity_sums(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> Sums:
    """Perplexity from (NLL, tokens) per row: exp(sum NLL / sum tokens)."""

    def score(sums: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))

    return Sums(np.stack([np.asarray(nll, float), np.asarray(tokens, float)], axis=1), score)


def loss_sums(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> Sums:
    """Loss in nats per token from (NLL, tokens) per row: sum NLL / sum tokens."""
    rows = np.stack([np.asarray(nll, float), np.asarray(tokens, float)], axis=1)

    def score(sums: Array) -> Array:
        return np.asarray(
            np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] > 0)
        )

    return Sums(rows, score)
