"""Linear layers with adapters on one input, forward and backward as few large matrix products.

For each layer i:  Y_i = c_i * (X W_i^T + s_i (X A_i^T) B_i^T) + bias_i

Backward, with D_i = c_i * dY_i:  dB_i = s_i D_i^T (X A_i^T),  dA_i = s_i (D_i B_i)^T X,
dX = sum_i D_i W_i + s_i (D_i B_i) A_i,  dc_i = colsum(dY_i * Z_i) with Z_i what c_i multiplies.

Saved: X once for all layers, the N x R products, and Z_i where c_i is trained. No gradient for W, no dX where
nothing before needs it, and every sum into an existing matrix is an `addmm_` on it. Products run in the dtype of
autocast, or else of the frozen weight; adapter parameters may be fp32 masters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from haori.adapters.fused.factors import LinearPlan, read_factors

__all__ = [
    "Product",
    "a_gradients",
    "back_products",
    "compute_dtype",
    "frozen_output",
    "lora_linears",
    "product_gradients",
]


def lora_linears(x: Tensor, plans: Sequence[LinearPlan]) -> tuple[Tensor, ...]:
    """Apply several linear layers to x [..., in] and return their outputs [..., out_i], differentiable."""
    factors: list[Tensor | None] = []
    for plan in plans:
        factors += read_factors(plan) if plan.adapter is not None else (None, None, None)
    outputs: tuple[Tensor, ...] = _Projections.apply(x, tuple(plans), *factors)  # type: ignore[no-untyped-call]
    return outputs


def compute_dtype(x: Tensor, plan: LinearPlan) -> torch.dtype:
    """Return the dtype that products run in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype if plan.frozen.quantized else plan.frozen.layer.weight.dtype


class Product:
    """X A^T of several adapters on one X, and their scaled B, as saved for backward. Rows N, ranks R_i."""

    def __init__(self, x: Tensor, plans: Sequence[LinearPlan], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self.a = torch.cat([part.to(x.dtype) for part in a])  # [sum R, in]
        self.b = [(part * plan.scale).to(x.dtype) for plan, part in zip(plans, b, strict=True)]  # [out, R], with s
        self.ranks = [part.shape[0] for part in a]
        self.masks = [_mask(x, plan.dropout) for plan in plans]
        if any(mask is not None for mask in self.masks):
            parts = [_dropped(x, mask, p.dropout) @ part.to(x.dtype).T
                     for p, part, mask in zip(plans, a, self.masks, strict=True)]  # fmt: skip
            self.xa = torch.cat(parts, 1)
        else:
            self.xa = x @ self.a.T  # [N, sum R]

    def columns(self) -> tuple[Tensor, ...]:
        """Return X A_i^T of each adapter, [N, R_i]."""
        return torch.split(self.xa, self.ranks, 1)


def product_gradients(
    x: Tensor, plans: Sequence[LinearPlan], product: Product, out: Sequence[Tensor], dx: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return (dA, dB) of each adapter for output gradients `out` [N, out_i], and add their share to `dx` in place."""
    back, db = back_products(plans, product, out, dx)
    return list(zip(a_gradients(x, plans, product, back), db, strict=True))


def back_products(
    plans: Sequence[LinearPlan], product: Product, out: Sequence[Tensor], dx: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return s D B of all adapters [N, sum R] and each dB, and add the adapters' share to `dx` in place."""
    back = torch.cat([d @ b for d, b in zip(out, product.b, strict=True)], 1)
    db = [(d.T @ xa).mul_(plan.scale) for d, xa, plan in zip(out, product.columns(), plans, strict=True)]
    if dx is not None and any(mask is not None for mask in product.masks):
        parts = zip(torch.split(back, product.ranks, 1), torch.split(product.a, product.ranks), strict=True)
        for plan, mask, (part, a) in zip(plans, product.masks, parts, strict=True):
            dx.add_(_dropped(part @ a, mask, plan.dropout))
    elif dx is not None:
        dx.addmm_(back, product.a)
    return back, db


def a_gradients(x: Tensor, plans: Sequence[LinearPlan], product: Product, back: Tensor) -> tuple[Tensor, ...]:
    """Return dA of each adapter [R, in] from the input x [N, in] and `back_products`."""
    if all(mask is None for mask in product.masks):
        return torch.split(back.T @ x, product.ranks)
    parts = torch.split(back, product.ranks, 1)
    return tuple(
        part.T @ _dropped(x, mask, plan.dropout) for plan, mask, part in zip(plans, product.masks, parts, strict=True)
    )


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plans: tuple[LinearPlan, ...], *factors: Tensor | None) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x, plans[0])
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # [N, in]
        adapted = [i for i, plan in enumerate(plans) if plan.adapter is not None]
        with torch.autocast(x.device.type, enabled=False):
            product = None
            if adapted:
                product = Product(
                    flat, [plans[i] for i in adapted],
                    [factors[3 * i] for i in adapted], [factors[3 * i + 1] for i in adapted],  # type: ignore[misc]
                )  # fmt: skip
            outputs, kept = [], []
            for i, plan in enumerate(plans):
                c = factors[3 * i + 2]
                y = frozen_output(flat, plan, dtype, with_bias=c is None)
                if product is not None and plan.adapter is not None:
                    place = adapted.index(i)
                    y.addmm_(product.columns()[place], product.b[place].T)
                if c is not None:
                    kept.append(y)
                    y = (y * c.to(dtype)) if plan.frozen.bias is None else (y * c.to(dtype)).add_(plan.frozen.bias)
                # Not a view to autograd, which forbids models to change a view from a Function in place.
                outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
        ctx.plans, ctx.product, ctx.dtype, ctx.adapted = plans, product, dtype, adapted
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        needed = flat if adapted else None  # a frozen layer's gradient does not depend on its input
        ctx.save_for_backward(needed, *[factors[3 * i + 2] for i in range(len(plans))], *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plans, product, dtype = ctx.plans, ctx.product, ctx.dtype
        flat, *rest = ctx.saved_tensors
        scales, kept = rest[: len(plans)], iter(rest[len(plans) :])
        out: list[Tensor] = []
        result: list[Tensor | None] = [None] * (3 * len(plans))
        with torch.autocast(grads[0].device.type, enabled=False):
            for i, (grad, c) in enumerate(zip(grads, scales, strict=True)):
                d = grad.reshape(-1, grad.shape[-1]).to(dtype)
                if c is not None:
                    result[3 * i + 2] = (d * next(kept)).sum(0, dtype=torch.float32).to(c.dtype)
                    d = d * c.to(dtype)
                out.append(d)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = out[0] @ plans[0].frozen.weight(dtype)
                for d, plan in zip(out[1:], plans[1:], strict=True):
                    dx.addmm_(d, plan.frozen.weight(dtype))
            if product is not None:
                of = [plans[i] for i in ctx.adapted]
                found = product_gradients(flat, of, product, [out[i] for i in ctx.adapted], dx)
                for i, (da, db) in zip(ctx.adapted, found, strict=True):
                    result[3 * i], result[3 * i + 1] = da, db
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype), None, *result)


def frozen_output(flat: Tensor, plan: LinearPlan, dtype: torch.dtype, *, with_bias: bool) -> Tensor:
    """Return X W^T (+ bias) of the frozen layer for flat [N, in]."""
    weight, bias = plan.frozen.weight(dtype), plan.frozen.bias
    if bias is not None and with_bias:
        return torch.addmm(bias.to(dtype), flat, weight.T)
    return flat @ weight.T


def _mask(x: Tensor, probability: float) -> Tensor | None:
    """Draw which inputs survive, with the random numbers that `torch.nn.functional.dropout` would draw."""
    if probability == 0.0:
        return None
    return torch.nn.functional.dropout(torch.ones_like(x), probability) != 0


def _dropped(x: Tensor, mask: Tensor | None, probability: float) -> Tensor:
    return x if mask is None else (x * mask).mul_(1 / (1 - probability))
