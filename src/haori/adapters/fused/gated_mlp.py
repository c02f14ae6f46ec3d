"""The gated MLP of Llama-like models, y = down(act(gate(x)) * up(x)), as one Function.

Saved: x, the pre-activations of gate and up, and the N x R products of the adapters; the activation and its product
are computed again in backward. Layers that rescale rows (DoRA) run as single projections instead.
"""

from typing import Any

import torch
from torch import Tensor

from haori.adapters.fused.factors import LinearPlan, read_factors
from haori.adapters.fused.kernels import Activation, kernels_for
from haori.adapters.fused.projections import (
    Product,
    a_gradients,
    back_products,
    compute_dtype,
    frozen_output,
    product_gradients,
)
from haori.adapters.fused.row_linears import linears

__all__ = ["gated_mlp"]


def gated_mlp(x: Tensor, gate: LinearPlan, up: LinearPlan, down: LinearPlan, activation: Activation) -> Tensor:
    """Return down(act(gate(x)) * up(x)) for x [..., D], differentiable in x and the adapters."""
    plans = (gate, up, down)
    if any(plan.by_rows for plan in plans):
        g, u = linears(x, (gate, up))
        h: Tensor = _Gate.apply(g, u, activation)  # type: ignore[no-untyped-call]
        return linears(h, (down,))[0]
    if any(plan.rescaled for plan in plans):
        g, u = linears(x, (gate, up))
        return linears(activation.forward(g) * u, (down,))[0]
    factors: list[Tensor | None] = []
    for plan in plans:
        factors += read_factors(plan)[:2] if plan.adapter is not None else (None, None)
    y: Tensor = _GatedMlp.apply(x, plans, activation, *factors)  # type: ignore[no-untyped-call]
    return y


class _Gate(torch.autograd.Function):
    """h = act(gate) * up [..., I]; only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        g, u = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
        return kernels_for(g, u).gate(g, u, activation).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        g, u = (x.reshape(-1, x.shape[-1]) for x in ctx.saved_tensors)
        d = grad.reshape(g.shape).clone()  # it is used up
        _, dg, du = kernels_for(d, g, u).gate_back(d, g, u, ctx.activation)
        return dg.view(grad.shape), du.view(grad.shape), None


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plans: tuple[LinearPlan, ...], activation: Activation, *factors: Tensor | None
    ) -> Tensor:
        dtype = compute_dtype(x, plans[0])
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner = _product(flat, plans[:2], factors[:4])
            g, u = (frozen_output(flat, plan, dtype, with_bias=True) for plan in plans[:2])
            _add(inner, plans[:2], (g, u))
            h = kernels_for(g, u).gate(g, u, activation)
            outer = _product(h, plans[2:], factors[4:])
            y = frozen_output(h, plans[2], dtype, with_bias=True)
            _add(outer, plans[2:], (y,))
        ctx.plans, ctx.activation, ctx.inner, ctx.outer = plans, activation, inner, outer
        ctx.x_shape, ctx.x_dtype, ctx.dtype = x.shape, x.dtype, dtype
        ctx.save_for_backward(flat, g, u)
        # May be changed in place, which autograd forbids of a view.
        shaped: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return shaped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plans, activation, dtype = ctx.plans, ctx.activation, ctx.dtype
        flat, g, u = ctx.saved_tensors
        with torch.autocast(flat.device.type, enabled=False):
            d = grad.reshape(-1, grad.shape[-1]).to(dtype)
            dh = d @ plans[2].frozen.weight(dtype)
            outer: list[Tensor | None] = [None, None]
            if ctx.outer is not None:
                back, (outer[1],) = back_products(plans[2:], ctx.outer, (d,), dh)
            h, dg, du = kernels_for(dh, g, u).gate_back(dh, g, u, activation)
            if ctx.outer is not None:
                (outer[0],) = a_gradients(h, plans[2:], ctx.outer, back)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = dg @ plans[0].frozen.weight(dtype)
                dx.addmm_(du, plans[1].frozen.weight(dtype))
            inner = _gradients(plans[:2], ctx.inner, flat, (dg, du), dx)
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype), None, None, *inner, *outer)


def _product(x: Tensor, plans: tuple[LinearPlan, ...], factors: tuple[Tensor | None, ...]) -> Product | None:
    adapted = [i for i, plan in enumerate(plans) if plan.adapter is not None]
    if not adapted:
        return None
    a, b = [factors[2 * i] for i in adapted], [factors[2 * i + 1] for i in adapted]
    return Product(x, [plans[i] for i in adapted], a, b)  # type: ignore[arg-type]


def _add(product: Product | None, plans: tuple[LinearPlan, ...], outputs: tuple[Tensor, ...]) -> None:
    if product is None:
        return
    adapted = [y for plan, y in zip(plans, outputs, strict=True) if plan.adapter is not None]
    for y, xa, b in zip(adapted, product.columns(), product.b, strict=True):
        y.addmm_(xa, b.T)


def _gradients(
    plans: tuple[LinearPlan, ...], product: Product | None, x: Tensor, out: tuple[Tensor, ...], dx: Tensor | None
) -> list[Tensor | None]:
    result: list[Tensor | None] = [None] * (2 * len(plans))
    if product is None:
        return result
    adapted = [i for i, plan in enumerate(plans) if plan.adapter is not None]
    found = product_gradients(x, [plans[i] for i in adapted], product, [out[i] for i in adapted], dx)
    for i, (da, db) in zip(adapted, found, strict=True):
        result[2 * i], result[2 * i + 1] = da, db
    return result
