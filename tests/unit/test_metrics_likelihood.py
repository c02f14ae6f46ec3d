"""Perplexity against hand-computed values."""

import math

import pytest

from haori.metrics.likelihood import perplexity


def test_perplexity_weighs_by_tokens() -> None:
    # 2 tokens at 1 nat each and 8 tokens at 0.5 nat each: exp(6 / 10), not the mean of e and sqrt(e).
    assert perplexity([2.0, 4.0], [2, 8]) == pytest.approx(math.exp(0.6))
