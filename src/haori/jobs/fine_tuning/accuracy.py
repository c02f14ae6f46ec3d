"""The share of trained tokens that a model finds likeliest of all, each given the true tokens before it."""

from typing import Any

import torch

from haori.data.batching import plan_batches

__all__ = ["token_accuracy"]

_IGNORED = -100


@torch.no_grad()
def token_accuracy(model: Any, objective: Any, budget: int, *, most_rows: int | None = None) -> float | None:
    """Measure the accuracy over the rows of an objective of text generation.

    Args:
        model: A causal language model.
        objective: Its batches have `input_ids`, `attention_mask` and `labels`.
        budget: Tokens of one forward pass, padding included.
        most_rows: Measure this many rows, spread over all of them.

    Returns:
        A share from 0 to 1; None where no token is trained.
    """
    count = len(objective.costs)
    chosen = range(count) if most_rows is None else range(0, count, max(1, -(-count // most_rows)))
    rows = list(chosen)
    model.eval()
    device = next(model.parameters()).device
    right = wanted = 0
    for places in plan_batches([objective.costs[row] for row in rows], budget):
        batch = objective.batch([rows[place] for place in places], device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        targets = batch.labels[:, 1:]  # B T-1
        mask = targets != _IGNORED
        right += int((logits[:, :-1].argmax(-1) == targets)[mask].sum())
        wanted += int(mask.sum())
    return right / wanted if wanted else None
