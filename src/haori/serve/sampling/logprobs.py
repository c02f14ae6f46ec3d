"""Log-probabilities of chosen tokens under the model itself: before temperature, filters, penalties and constraints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.serve.request import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["token_logprobs"]


def token_logprobs(
    logits: "Tensor",
    tokens: Sequence[int],
    tops: Sequence[int],
    *,
    ranked: bool = False,
    named: Sequence[Sequence[int]] = (),
) -> list[TokenLogprob]:
    """Return each row's log-probability (nats, float32) of its token and of so many of its likeliest tokens.

    Args:
        logits: (N, V), in any floating type.
        tokens: The chosen id of each row.
        tops: How many of the likeliest to name for each row; equally likely ones are named in the order of ids.
        ranked: Whether each token's rank among all is wanted too.
        named: Ids of each row to name after the likeliest, in any order; of no row where there are none.
    """
    import torch

    table = logits.float().log_softmax(-1)  # N V
    chosen = table.gather(1, torch.tensor(list(tokens), device=table.device)[:, None])  # N 1
    ranks = (1 + (table > chosen).sum(1)).tolist() if ranked else [None] * len(tokens)
    tables = _all_likeliest(table, tops)
    for row, ids in enumerate(named):
        if ids:
            values = table[row, torch.tensor(list(ids), device=table.device)].tolist()
            tables[row] = (*tables[row], *zip(ids, values, strict=True))
    return [
        TokenLogprob(token, logprob, top, rank)
        for token, logprob, top, rank in zip(tokens, chosen[:, 0].tolist(), tables, ranks, strict=True)
    ]


def _all_likeliest(table: "Tensor", tops: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return the likeliest ids with their values for each row; those without equal ones among them in one go."""
    most = min(max(tops, default=0) + 1, table.shape[1])
    if most == 1:
        return [()] * len(tops)
    values, ids = table.topk(most)
    distinct = (values[:, 1:] < values[:, :-1]).all(1).tolist()
    plain = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        plain[row][:top] if distinct[row] else _likeliest(table[row], top) if top else ()
        for row, top in enumerate(tops)
    ]


def _likeliest(row: "Tensor", top: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest ids with their values; `topk` alone does not say which of equal ones it takes."""
    top = min(top, len(row))
    ids = (row >= row.topk(top).values[-1]).nonzero()[:, 0]
    values, order = row[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order[:top]].tolist(), values[:top].tolist(), strict=True))
