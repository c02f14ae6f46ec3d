"""Scores from one model: likelihood of trained tokens, and likelihood of each label after a prompt.

Assumes a causal language model with an output head. Logits exist only where a token is scored and only for
one batch: hidden states are picked out just before the head, so no [B, T, V] tensor is ever made. Knows nothing
of adapters, tokenizers or metrics.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from haori.core.errors import VerificationError
from haori.core.progress_bar import progress_bar
from haori.data.batching import plan_batches
from haori.metrics.statistics import Array

__all__ = [
    "RowScores",
    "ScoredRow",
    "default_budget",
    "score_labels",
    "score_labels_slow",
    "score_rows",
]

_SOFTMAX_ROWS = 128  # rows of float32 [rows, V] at once
_CACHE_BUDGETS = 4  # token budgets that a repeated key-value cache may hold


class ScoredRow(Protocol):
    """A rendered row: token ids, and labels of the same length with -100 where a token is not scored."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Return the token ids."""

    @property
    def labels(self) -> Sequence[int]:
        """Return the labels."""


class RowScores(NamedTuple):
    """Per row: summed negative log-likelihood in nats, and the number of tokens it sums over."""

    nll: Array
    tokens: Array


class _Ids(NamedTuple):
    input_ids: list[int]
    labels: list[int]


def default_budget(model: nn.Module) -> int:
    """Return how many tokens, padding included, go through the model at once."""
    return 1024 if _device(model).type == "cpu" else 16384


@torch.inference_mode()
def score_rows(
    model: nn.Module, rows: Sequence[ScoredRow], *, budget: int | None = None, title: str = "Scoring"
) -> RowScores:
    """Sum -log p(token | tokens before it) over the labelled tokens of each row.

    Rows are batched by length, longest first, and padded on the right. The first token of a row has nothing
    before it and is never scored. Log-softmax is in float32, sums in float64.

    Raises:
        VerificationError: A likelihood is not a finite number.
    """
    nll, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    lengths = [len(row.input_ids) for row in rows]
    with progress_bar(title, sum(lengths), "tokens") as advance:
        for batch in plan_batches(lengths, budget or default_budget(model)):
            ids, mask = _pad([rows[index].input_ids for index in batch], "right", _device(model))
            labels = torch.full_like(ids, -100)
            for place, index in enumerate(batch):
                labels[place, : lengths[index]] = torch.tensor([*rows[index].labels])
            targets = labels[:, 1:]  # [B, T - 1]: the logits at t are for the token at t + 1
            where = (targets != -100).nonzero(as_tuple=True)  # N row and N column indices
            if len(where[0]):
                logits, _ = _logits_at(model, where, input_ids=ids, attention_mask=mask, use_cache=False)
                found = -_log_probs(logits, targets[where])  # [N]
                rows_of = where[0].cpu()
                nll[batch] = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows_of, found).numpy()
                tokens[batch] = torch.bincount(rows_of, minlength=len(batch)).numpy()
            advance(sum(lengths[index] for index in batch))
    _check_finite(nll)
    return RowScores(nll, tokens)


@torch.inference_mode()
def score_labels(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    budget: int | None = None,
    title: str = "Choosing labels",
) -> Array:
    """Return [n, L]: log p(label | prompt), summed over the tokens of each label.

    A prompt goes through the model once, padded on the left. Labels of one token are read off its last
    logits; longer ones go on from its key-value cache, one cache row per label. Equal to `score_labels_slow`.

    Args:
        model: A causal language model.
        prompts: Token ids of each prompt, ending where the answer starts.
        labels: Token ids of each label, the same for every prompt, none empty.
        budget: Tokens at once, padding included.
        title: What the progress bar says.

    Raises:
        VerificationError: A likelihood is not a finite number.
    """
    scores = np.zeros((len(prompts), len(labels)))
    longer = [index for index, label in enumerate(labels) if len(label) > 1]
    firsts = torch.tensor([label[0] for label in labels])  # [L]
    budget = budget or default_budget(model)
    with progress_bar(title, sum(map(len, prompts)), "tokens") as advance:
        for batch in plan_batches([len(prompt) for prompt in prompts], budget):
            ids, mask = _pad([prompts[index] for index in batch], "left", _device(model))
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            last = (torch.arange(len(batch)), torch.full((len(batch),), ids.shape[1] - 1))
            logits, cache = _logits_at(
                model, last, input_ids=ids, attention_mask=mask, use_cache=bool(longer),
                **_positions(model, positions),
            )  # fmt: skip
            if longer and not _can_continue(cache):
                return score_labels_slow(model, prompts, labels, budget=budget, title=title)
            scores[batch] = _first_log_probs(logits, firsts)
            group = max(1, _CACHE_BUDGETS * budget // ids.numel())
            for start in range(0, len(longer), group):
                picks = longer[start : start + group]
                # The last group may use the cache up; the others leave the prompt's cache as it was.
                own = cache if start + group >= len(longer) else copy.deepcopy(cache)
                scores[np.ix_(batch, picks)] += _continue(model, own, mask, [labels[pick] for pick in picks])
            advance(sum(len(prompts[index]) for index in batch))
    _check_finite(scores)
    return scores


def score_labels_slow(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    budget: int | None = None,
    title: str = "Choosing labels",
) -> Array:
    """Return what `score_labels` does, from whole prompt + label rows: for caches that cannot be repeated."""
    rows = [
        _Ids([*prompt, *label], [-100] * len(prompt) + [*label])
        for prompt in prompts
        for label in labels
    ]  # fmt: skip
    return -score_rows(model, rows, budget=budget, title=title).nll.reshape(len(prompts), len(labels))


def _continue(model: nn.Module, cache: Any, prompt_mask: Tensor, labels: Sequence[Sequence[int]]) -> Array:
    """Return [B, G]: log p of the second and later tokens of G labels after each of B cached prompts."""
    device, (b, g) = prompt_mask.device, (len(prompt_mask), len(labels))
    fed, fed_mask = _pad([label[:-1] for label in labels], "right", device)  # [G, S]
    targets, _ = _pad([label[1:] for label in labels], "right", device)  # [G, S]
    cache.batch_repeat_interleave(g)  # row of prompt i and label j: i * G + j
    prompt_rows = prompt_mask.repeat_interleave(g, dim=0)  # [B * G, T]
    fed_rows = fed_mask.repeat(b, 1)  # [B * G, S]
    positions = prompt_rows.sum(1, keepdim=True) + torch.arange(fed.shape[1], device=device)
    where = fed_rows.nonzero(as_tuple=True)
    logits, _ = _logits_at(
        model, where, input_ids=fed.repeat(b, 1), attention_mask=torch.cat([prompt_rows, fed_rows], dim=1),
        past_key_values=cache, use_cache=True, **_positions(model, positions),
    )  # fmt: skip
    found = _log_probs(logits, targets.repeat(b, 1)[where])
    summed = torch.zeros(b * g, dtype=torch.float64).index_add_(0, where[0].cpu(), found)
    return np.asarray(summed.view(b, g).numpy())


def _logits_at(model: Any, where: tuple[Tensor, ...], **inputs: Any) -> tuple[Tensor, Any]:
    """Run the model; return [N, V] logits at N (row, column) places, and the cache."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        output = model(**inputs)
        return output.logits[where], getattr(output, "past_key_values", None)
    with _only(head, where):
        output = model(**inputs)
    return output.logits[0], getattr(output, "past_key_values", None)


@contextmanager
def _only(head: nn.Module, where: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the head see only the hidden states at N places: [B, T, D] -> [1, N, D]."""

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden[where][None], *inputs[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return [N] float64 log-probabilities of the targets, by float32 log-softmax a few rows at a time."""
    parts = []
    for start in range(0, len(targets), _SOFTMAX_ROWS):
        rows = logits[start : start + _SOFTMAX_ROWS].float()  # [n, V]
        chosen = rows.gather(1, targets[start : start + _SOFTMAX_ROWS, None])[:, 0]
        parts.append(chosen - rows.logsumexp(dim=1))
    return torch.cat(parts).double().cpu()


def _first_log_probs(logits: Tensor, firsts: Tensor) -> Array:
    """Return [B, L] log-probabilities of the first token of each label from [B, V] logits."""
    rows = logits.float()
    found = rows[:, firsts.to(rows.device)] - rows.logsumexp(dim=1, keepdim=True)
    return np.asarray(found.double().cpu().numpy())


def _pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [B, T] ids and mask. The padding id never matters: it is masked and never scored."""
    longest = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for place, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[place, start : start + len(row)] = torch.tensor([*row])
        mask[place, start : start + len(row)] = 1
    return ids.to(device), mask.to(device)


def _positions(model: Any, positions: Tensor) -> dict[str, Tensor]:
    """Pass positions to models that take them; the others (ALiBi) derive them from the mask."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"position_ids": positions} if "position_ids" in inspect.signature(inner.forward).parameters else {}


def _can_continue(cache: Any) -> bool:
    """Say whether every layer of the cache is plain keys and values, which may be repeated by row."""
    names = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return bool(names) and names <= {"DynamicLayer", "DynamicSlidingWindowLayer"}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check_finite(values: Array) -> None:
    bad = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    if bad:
        raise VerificationError(
            f"The model gives likelihoods that are not numbers on {bad} of {len(values)} rows; its weights "
            "are broken (NaN or infinite), so train it again with a lower learning rate."
        )
