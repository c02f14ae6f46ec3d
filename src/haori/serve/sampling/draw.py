"""Draws one token id per row from logits: temperature, min-p, top-k, top-p, and one uniform number each.

A row's token depends on nothing but its own logits, settings and uniform number: not on the rows beside it, on how
many threads add up, or on how much of the row was sorted. So weights are whole numbers, whose sums are exact in any
order, and tokens of equal weight are kept or dropped together. Knows nothing about requests or random generators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Filters", "draw"]

_HEAD = 64
"""So many of the likeliest tokens are sorted first when looking for the end of top-p: with most texts they hold it."""

_BUCKET_SHIFT = 17
"""Drops mantissa bits of a float32: 64 buckets for each doubling of the weight."""


@dataclass(frozen=True)
class Filters:
    """What one row samples from, as in `Sampling`; the temperature is above 0, and `top_k` 0 is off."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw(logits: "Tensor", filters: Sequence[Filters], uniforms: Sequence[float]) -> list[int]:
    """Return a token id for each row, by inverting the cumulative weights in the order of ids.

    A token weighs w = exp((l - max l) / temperature), as a whole number of steps of about V / 2^62. Kept are tokens of
    w >= min_p; of these the `top_k` of greatest logit; of these the fewest likeliest ones that hold the share `top_p`.
    Tokens as likely as the last one kept are kept too. The order is vLLM's.

    Args:
        logits: (N, V) float32, each row with a finite maximum; -inf excludes a token. Changed in place.
        filters: One for each row. Rows with and without `top_k`, or `top_p`, may be mixed, but are faster apart.
        uniforms: A number in [0, 1) for each row.
    """
    import torch

    vocabulary = logits.shape[1]
    ids: Tensor | None = None
    temperature = logits.new_tensor([row.temperature for row in filters])[:, None]  # N 1
    min_p = logits.new_tensor([row.min_p for row in filters])[:, None]  # N 1
    if any(row.top_k for row in filters):
        logits, ids = _pack(logits >= _kth_logit(logits, [row.top_k for row in filters]), logits, float("-inf"))
    weights = _weights(logits, temperature, min_p, 62 - vocabulary.bit_length())  # N W, W <= V
    if any(row.top_p < 1.0 for row in filters):
        shares = torch.tensor([row.top_p for row in filters], dtype=torch.float64, device=logits.device)
        weights *= weights >= _nucleus_floor(weights, shares)
    sums = weights.cumsum(1)  # N W
    shares = torch.tensor(list(uniforms), dtype=torch.float64, device=logits.device)
    # Below the total: the greatest number under 1 takes off more than rounding to float64 can add.
    goal = (sums[:, -1] * shares).long()  # N
    slots = torch.searchsorted(sums, goal[:, None], right=True)  # N 1
    chosen = slots if ids is None else ids.gather(1, slots)
    return [int(token) for token in chosen[:, 0].tolist()]


def _weights(logits: "Tensor", temperature: "Tensor", min_p: "Tensor", bits: int) -> "Tensor":
    """Return int64 weights of which the greatest is 2^bits; the sum of a row stays below 2^62."""
    scaled = logits.sub_(logits.amax(1, keepdim=True)).div_(temperature).exp_()
    if bool((min_p > 0).any()):
        scaled *= scaled >= min_p  # several times as fast as a masked fill
    return scaled.mul_(2.0**bits).long()


def _kth_logit(logits: "Tensor", top_k: Sequence[int]) -> "Tensor":
    """Return the logit of the k-th likeliest token of each row, (N, 1)."""
    import torch

    vocabulary = logits.shape[1]
    counts = [min(k or vocabulary, vocabulary) for k in top_k]
    last = torch.tensor(counts, device=logits.device)[:, None] - 1
    return logits.topk(max(counts), dim=1).values.gather(1, last)


def _nucleus_floor(weights: "Tensor", shares: "Tensor") -> "Tensor":
    """Return the smallest weight among the fewest greatest ones that hold the share of each row, (N, 1)."""
    totals = weights.sum(1)
    goals = (totals * shares).ceil().long().clamp(min=1).minimum(totals)[:, None]  # N 1
    head = weights.topk(min(_HEAD, weights.shape[1]), dim=1).values
    floors, reached = _floor_of_sorted(head, goals)
    if not bool(reached.all()):
        floors[~reached] = _floor_by_buckets(weights[~reached], goals[~reached])
    return floors


def _floor_of_sorted(weights: "Tensor", goals: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the weight at which falling weights add up to each goal, (N, 1), and which rows do, (N,)."""
    import torch

    sums = weights.cumsum(1)
    last = torch.searchsorted(sums, goals)
    return weights.gather(1, last.clamp(max=weights.shape[1] - 1)), last[:, 0] < weights.shape[1]


def _floor_by_buckets(weights: "Tensor", goals: "Tensor") -> "Tensor":
    """Find the same without sorting a whole row: add up by size first, then sort the size where the goal is met."""
    import torch

    bucket = (weights.float().view(torch.int32) >> _BUCKET_SHIFT).long()  # grows with the weight
    mass = weights.new_zeros(len(weights), int(bucket.max()) + 1).scatter_add_(1, bucket, weights)  # N buckets
    from_above = mass.flip(1).cumsum(1).flip(1)
    met = (from_above >= goals).sum(1, keepdim=True) - 1  # N 1
    in_bucket, _ = _pack(bucket == met, weights, 0)
    rest = goals - (from_above - mass).gather(1, met)
    return _floor_of_sorted(in_bucket.sort(1, descending=True).values, rest)[0]


def _pack(keep: "Tensor", values: "Tensor", filler: float) -> "tuple[Tensor, Tensor]":
    """Move what is kept to the front of each row: values (N, W) and the columns they had, in ascending order."""
    import torch

    rows, columns = keep.nonzero(as_tuple=True)  # sorted by row, then column
    counts = keep.sum(1)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=rows.device) - starts[rows]
    shape = (len(keep), int(counts.max()))
    packed, origin = values.new_full(shape, filler), columns.new_zeros(shape)
    packed[rows, slots] = values[rows, columns]
    origin[rows, slots] = columns
    return packed, origin
