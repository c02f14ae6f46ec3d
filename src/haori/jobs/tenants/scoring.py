"""The losses of packed rows at the output head, whatever the loss of each row."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from haori.adapters.fused.factors import RowFactors
from haori.adapters.fused.scored_head import Scored, score_targets
from haori.jobs.tenants.rows import Row

__all__ = ["score_rows"]


def score_rows(
    rows: Sequence[Row], hidden: Tensor, weight: Tensor, adapters: Sequence[RowFactors], *, backward: bool
) -> Scored:
    """Give every row its log-probabilities, and return the gradient of all losses.

    Args:
        rows: In the order in which they are packed.
        hidden: Their last hidden states, [N, D].
        weight: The frozen head [V, D].
        adapters: LoRA factors on the head, by packed tokens.
        backward: Whether gradients are wanted.

    Returns:
        dL/dh [N, D] and (dA, dB) of each adapter, summed; no log-probabilities, since the rows have theirs.
    """
    gradient = torch.zeros_like(hidden, dtype=weight.dtype) if backward else None
    sums = [(torch.zeros_like(one.a), torch.zeros_like(one.b)) for one in adapters]
    start = 0
    # Neighbours with as many targets to a token, and of one way to know c, are scored together.
    for (_, in_advance), found in groupby(rows, key=lambda row: (row.targets.shape[1], row.loss.whole_rows)):
        chosen = list(found)
        stop = start + sum(row.length for row in chosen)
        own = [_within(one, start, stop) for one in adapters]
        targets = torch.cat([row.targets for row in chosen]).to(hidden.device)
        h = hidden[start:stop]
        if in_advance or not backward:
            _hand_out(chosen, score_targets(h, weight, targets, None, own).logprobs)
        if gradient is not None:
            scored = score_targets(h, weight, targets, _RowCoefficients(chosen, in_advance=in_advance), own)
            assert scored.gradient is not None
            _hand_out(chosen, scored.logprobs)
            gradient[start:stop] = scored.gradient
            for (a, b), (da, db) in zip(sums, scored.factors, strict=True):
                a.add_(da)
                b.add_(db)
        start = stop
    return Scored(torch.empty(0), gradient, sums)


class _RowCoefficients:
    """c = -dL/dlogp of packed rows, chunk by chunk; from whole rows scored in advance where a loss needs these."""

    def __init__(self, rows: Sequence[Row], *, in_advance: bool) -> None:
        self.pieces: list[tuple[int, int, Row, Tensor | None]] = []
        start = 0
        for row in rows:
            known = row.coefficients(row.logprobs, slice(None)) if in_advance and row.logprobs is not None else None
            self.pieces.append((start, start + row.length, row, known))
            start += row.length

    def __call__(self, part: slice, logprobs: Tensor) -> Tensor:
        c = torch.zeros_like(logprobs)
        for start, stop, row, known in self.pieces:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                within, here = slice(low - start, high - start), slice(low - part.start, high - part.start)
                own = row.coefficients(logprobs[here].cpu(), within) if known is None else known[within]
                c[here] = own.to(c.device)
        return c


def _within(one: RowFactors, start: int, stop: int) -> RowFactors:
    """Return the factors with their tokens counted from `start`; none of them if they lie outside."""
    low, high = max(one.start, start), min(one.stop, stop)
    return one._replace(start=low - start, stop=max(high, low) - start)


def _hand_out(rows: Sequence[Row], logprobs: Tensor) -> None:
    for row, own in zip(rows, torch.split(logprobs.cpu(), [row.length for row in rows]), strict=True):
        row.logprobs = own
