"""The loss of a language model's head, over labelled rows only, in chunks, its gradient formed in the forward pass.

loss_n = logsumexp(W h_n) - (W h_n)[target_n];  dL/dh_n = (softmax(W h_n) - onehot) W

The logits of a chunk live only while it is worked on, so memory does not grow with the number of rows times the
vocabulary. torch's F.linear_cross_entropy does the same but gives no loss per row (docs/log.md compares the two).
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["head_losses"]

_CHUNK_ELEMENTS = 1 << 24  # of logits: 32 MiB in bf16
_CACHE_ELEMENTS = 1 << 19
_TINY = 1e-30


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss (with graph to `hidden`) and the loss of each row.

    Args:
        hidden: [N, D].
        weight: The frozen head [V, D].
        targets: [N], int64.

    Returns:
        Sum [] and losses [N], both fp32; the losses carry no graph.
    """
    total, each = _HeadLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return total, each


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        each = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        frozen = weight.detach().to(dtype)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = hidden[part].to(dtype) @ frozen.T  # [n, V]
                _losses_and_residuals(logits, targets[part], each[part])
                if gradient is not None:
                    gradient[part] = logits @ frozen
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None


def _losses_and_residuals(logits: Tensor, targets: Tensor, each: Tensor) -> None:
    """Write the loss of each row into `each` [n], and softmax - onehot over `logits` [n, V], a few rows at a time.

    The rows worked on stay in a core's cache; the softmax is fp32 whatever the dtype of the logits.
    """
    rows = max(1, _CACHE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(targets)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        wanted = targets[part].unsqueeze(1)
        p = torch.softmax(logits[part], -1, dtype=torch.float32)
        of_target = p.gather(1, wanted)
        each[part] = of_target.log().neg_().squeeze(1)
        if (of_target < _TINY).any():  # too unlikely for the logarithm of an fp32 probability
            whole = logits[part].float()
            each[part] = torch.logsumexp(whole, -1) - whole.gather(1, wanted).squeeze(1)
        logits[part] = p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))
