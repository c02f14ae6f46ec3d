"""Log-probabilities of given tokens, and the gradient of any loss of them, without logits that outlive a chunk.

Of a loss L of log-probabilities l_nk = log p(token k at row n), all that backward needs is c_nk = -dL/dl_nk:

    dL/dlogits_n = sum_k c_nk (softmax_n - onehot_k)

The head may carry LoRA factors on some rows: logits = W h + s B A h.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from haori.adapters.fused.factors import RowFactors
from haori.adapters.fused.kernels import kernels_for

__all__ = ["Coefficients", "Scored", "score_targets"]

_CHUNK_ELEMENTS = 1 << 24  # of logits
_MOSTLY = 0.75  # share of rows with a gradient from which on all of a chunk are multiplied

Coefficients = Callable[[slice, Tensor], Tensor]
"""Returns c [n, K] of the rows of a slice, given their log-probabilities [n, K]."""


class Scored(NamedTuple):
    """Log-probabilities [N, K] in fp32; dL/dh [N, D] in the head's dtype, and (dA, dB) of each adapter on the head."""

    logprobs: Tensor
    gradient: Tensor | None
    factors: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def score_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Coefficients | None = None,
    adapters: Sequence[RowFactors] = (),
) -> Scored:
    """Score tokens, and form the gradient of a loss of their scores.

    Args:
        hidden: [N, D].
        weight: The frozen head [V, D].
        targets: [N, K], int64; K > 1 for soft targets.
        coefficients: Gives c; None forms no gradient.
        adapters: LoRA factors on rows of the head.
    """
    dtype, device = weight.dtype, hidden.device
    hidden = hidden.to(dtype)
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=device)
    gradient = None if coefficients is None else torch.zeros(hidden.shape, dtype=dtype, device=device)
    own = [_HeadAdapter(one, dtype) for one in adapters]
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, len(targets), rows):
        part = slice(start, min(start + rows, len(targets)))
        logits = hidden[part] @ weight.T  # [n, V]
        for adapter in own:
            adapter.add(logits, hidden, part)
        if targets.shape[1] == 1:
            losses = torch.empty(len(logits), dtype=torch.float32, device=device)
            kernels_for(logits).residuals(logits, targets[part, 0], losses)  # softmax - onehot
            logprobs[part, 0] = -losses
        else:
            logprobs[part] = torch.log_softmax(logits.float(), -1).gather(1, targets[part])
        if gradient is None or coefficients is None:
            continue
        c = coefficients(part, logprobs[part])  # [n, K]
        if targets.shape[1] > 1:
            _soft_residuals(logits, targets[part], c)
            c = c.any(1, keepdim=True).float()
        taken = _rows_with_gradient(c)
        _back(logits[taken], weight, c[taken], gradient[part], taken)
        for adapter in own:
            adapter.back(logits, hidden, c, part, gradient)
    return Scored(logprobs, gradient, [(adapter.da, adapter.db) for adapter in own])


class _HeadAdapter:
    """One owner's factors on the head, and their gradients."""

    def __init__(self, factors: RowFactors, dtype: torch.dtype) -> None:
        self.rows, self.scale = factors, factors.scale
        self.a, self.b = factors.a.detach().to(dtype), (factors.b.detach() * factors.scale).to(dtype)
        self.da, self.db = torch.zeros_like(factors.a), torch.zeros_like(factors.b)

    def add(self, logits: Tensor, hidden: Tensor, part: slice) -> None:
        """Add s B A h to the logits of its rows in a chunk."""
        start, stop = max(self.rows.start, part.start), min(self.rows.stop, part.stop)
        if start < stop:
            logits[start - part.start : stop - part.start].addmm_(hidden[start:stop] @ self.a.T, self.b.T)

    def back(self, residuals: Tensor, hidden: Tensor, c: Tensor, part: slice, gradient: Tensor) -> None:
        """Add its share of dL/dh, and sum up dA and dB, from residuals [n, V] and row factors c [n, 1]."""
        start, stop = max(self.rows.start, part.start), min(self.rows.stop, part.stop)
        if start >= stop:
            return
        own = slice(start - part.start, stop - part.start)
        factor = c[own].to(hidden.dtype)
        back = (residuals[own] @ self.b) * factor  # [n, R], with s
        self.db.add_((residuals[own].T @ ((hidden[start:stop] @ self.a.T) * factor)), alpha=self.scale)
        self.da.add_(back.T @ hidden[start:stop])
        gradient[start:stop].addmm_(back, self.a)


def _rows_with_gradient(c: Tensor) -> Tensor | slice:
    """Return which rows are worth a product: all, or those whose coefficient is not zero."""
    used = c[:, 0] != 0
    return slice(None) if int(used.sum()) > _MOSTLY * len(c) else used


def _back(residuals: Tensor, weight: Tensor, c: Tensor, gradient: Tensor, taken: Tensor | slice) -> None:
    """Write c (softmax - onehot) W into the rows of `gradient` that are taken."""
    gradient[taken] = ((residuals @ weight).float() * c).to(gradient.dtype)


def _soft_residuals(logits: Tensor, targets: Tensor, c: Tensor) -> None:
    """Write sum_k c_k (softmax - onehot_k) over the logits [n, V]."""
    p = torch.softmax(logits, -1, dtype=torch.float32).mul_(c.sum(1, keepdim=True))
    logits.copy_(p.scatter_add_(1, targets, -c))
