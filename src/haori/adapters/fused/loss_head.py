"""The loss of a language model's head, over labelled rows only, in chunks, its gradient formed in the forward pass.

loss_n = logsumexp(W h_n) - (W h_n)[target_n];  dL/dh_n = (softmax(W h_n) - onehot) W

The logits of a chunk live only while it is worked on, so memory does not grow with the number of rows times the
vocabulary. torch's F.linear_cross_entropy does the same but gives no loss per row (docs/log.md compares the two).
"""

from typing import Any

import torch
from torch import Tensor

from haori.adapters.fused.kernels import kernels_for

__all__ = ["head_losses"]

_CHUNK_ELEMENTS = 1 << 24  # of logits: 32 MiB in bf16


def head_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the loss of each row, with graph to `hidden`.

    Args:
        hidden: [N, D].
        weight: The frozen head [V, D].
        targets: [N], int64.

    Returns:
        Sum [] and losses [N], both fp32 and differentiable.
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
                kernels_for(logits).residuals(logits, targets[part], each[part])
                if gradient is not None:
                    gradient[part] = logits @ frozen
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_each: Tensor | None) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        if grad_each is None:
            return (None if grad is None else (gradient * grad).to(ctx.dtype)), None, None
        weights = grad_each if grad is None else grad_each + grad  # [N]
        return (gradient * weights.unsqueeze(1)).to(ctx.dtype), None, None
