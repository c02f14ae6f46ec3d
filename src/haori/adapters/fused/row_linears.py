"""Linear layers whose input rows belong to several owners, each with LoRA factors of its own.

    y[n] = W x[n] + bias + s_j B_j A_j x[n]     for the rows n of owner j

The product with W runs over all rows at once; the factors of an owner multiply its own rows only, forward and
backward. So no number of one owner enters another's sums, not even as a zero: NaN stays with its owner.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from haori.adapters.fused.factors import LinearPlan
from haori.adapters.fused.projections import compute_dtype, frozen_output, lora_linears

__all__ = ["linears"]


def linears(x: Tensor, plans: Sequence[LinearPlan]) -> tuple[Tensor, ...]:
    """Apply several linear layers to x [..., in] and return their outputs [..., out_i], differentiable."""
    if not any(plan.by_rows for plan in plans):
        return lora_linears(x, plans)
    spans: dict[tuple[int, int], list[_Part]] = {}
    factors: list[Tensor] = []
    for layer, plan in enumerate(plans):
        for own in plan.adapter.active if plan.by_rows else ():
            spans.setdefault((own.start, own.stop), []).append(_Part(layer, len(factors), own.scale))
            factors += (own.a, own.b)
    outputs: tuple[Tensor, ...] = _RowLinears.apply(x, tuple(plans), spans, *factors)  # type: ignore[no-untyped-call]
    return outputs


class _Part(NamedTuple):
    """An owner's factors on one of the layers: A is the argument at `place`, B the next."""

    layer: int
    place: int
    scale: float


class _RowLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plans: tuple[LinearPlan, ...],
        spans: dict[tuple[int, int], list[_Part]],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x, plans[0])
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # [N, in]
        kept: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            outputs = [frozen_output(flat, plan, dtype, with_bias=True) for plan in plans]
            for (start, stop), parts in spans.items():
                a = torch.cat([factors[part.place].to(dtype) for part in parts])  # [sum R, in]
                xa = flat[start:stop] @ a.T  # [n, sum R]
                columns = torch.split(xa, [len(factors[part.place]) for part in parts], 1)
                for part, column in zip(parts, columns, strict=True):
                    b = (factors[part.place + 1] * part.scale).to(dtype)
                    outputs[part.layer][start:stop].addmm_(column, b.T)
                kept.append(xa)
        ctx.plans, ctx.spans, ctx.dtype = plans, spans, dtype
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(flat if spans else None, *kept, *factors)
        # Not a view to autograd, which forbids models to change a view from a Function in place.
        return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plans, spans, dtype = ctx.plans, ctx.spans, ctx.dtype
        flat, *rest = ctx.saved_tensors
        products, factors = rest[: len(spans)], rest[len(spans) :]
        result: list[Tensor | None] = [None] * len(factors)
        with torch.autocast(grads[0].device.type, enabled=False):
            out = [grad.reshape(-1, grad.shape[-1]).to(dtype) for grad in grads]
            dx = None
            if ctx.needs_input_grad[0]:
                dx = out[0] @ plans[0].frozen.weight(dtype)
                for d, plan in zip(out[1:], plans[1:], strict=True):
                    dx.addmm_(d, plan.frozen.weight(dtype))
            for ((start, stop), parts), xa in zip(spans.items(), products, strict=True):
                ranks = [len(factors[part.place]) for part in parts]
                back = []
                for part, column in zip(parts, torch.split(xa, ranks, 1), strict=True):
                    d, b = out[part.layer][start:stop], factors[part.place + 1]
                    back.append(d @ (b * part.scale).to(dtype))
                    result[part.place + 1] = (d.T @ column).mul_(part.scale)
                together = torch.cat(back, 1)  # [n, sum R]
                for part, da in zip(parts, torch.split(together.T @ flat[start:stop], ranks), strict=True):
                    result[part.place] = da
                if dx is not None:
                    dx[start:stop].addmm_(together, torch.cat([factors[part.place].to(dtype) for part in parts]))
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype), None, None, *result)
