"""Log-probabilities of chosen tokens under the model itself: before temperature, filters, penalties and constraints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.serve.request import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["token_logprobs"]


def token_logprobs(logits: "Tensor", tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Return each row's log-probability (nats, float32) of its token and of so many of its likeliest tokens.

    Args:
        logits: (N, V), in any floating type.
        tokens: The chosen id of each row.
        tops: How many of the likeliest to name for each row; equally likely ones are named in the order of ids.
    """
    import torch

    table = logits.float().log_softmax(-1)  # N V
    chosen = table.gather(1, torch.tensor(list(tokens), device=table.device)[:, None])[:, 0].tolist()
    return [
        TokenLogprob(token, logprob, _likeliest(row, top) if top else ())
        for row, token, logprob, top in zip(table, tokens, chosen, tops, strict=True)
    ]


def _likeliest(row: "Tensor", top: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest ids with their values; `topk` alone does not say which of equal ones it takes."""
    top = min(top, len(row))
    ids = (row >= row.topk(top).values[-1]).nonzero()[:, 0]
    values, order = row[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order[:top]].tolist(), values[:top].tolist(), strict=True))
