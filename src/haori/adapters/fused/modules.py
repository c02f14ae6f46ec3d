"""Fused stand-ins for the modules of a model, each tried against the module it stands in for.

A module is recognised by its parts (a gated MLP has gate_proj, up_proj, down_proj and act_fn), never by its class.
Whether the guess is right is measured: the stand-in must give what the module gives on a small random input, or it is
not used. A stand-in is a function that takes the place of `forward`; it steps aside for calls it does not cover.
"""

from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from haori.adapters.fused.attention import causal_attention
from haori.adapters.fused.coverage import unusual_attention, unusual_mlp
from haori.adapters.fused.elementwise import rms_norm, rotate
from haori.adapters.fused.factors import has_adapter, linear_plan, why_not
from haori.adapters.fused.gated_mlp import gated_mlp
from haori.adapters.fused.kernels import ACTIVATIONS, Activation
from haori.adapters.fused.row_linears import linears
from haori.adapters.fused.trial import PROBE_TOKENS, StandIn, tried

__all__ = [
    "PackedRows",
    "RowLayout",
    "SharedPrefix",
    "StandIn",
    "attention_stand_in",
    "linear_stand_in",
    "mlp_stand_in",
    "norm_stand_in",
]


class RowLayout(Protocol):
    """How rows lie in one long row [1, N]: it says which tokens see which."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return causal attention within each row, for q [1, N, H, d] and k, v [1, N, K, d]."""
        ...


class PackedRows(NamedTuple):
    """Rows one behind the other without padding; `lengths` are their tokens, neighbours of one length run together."""

    lengths: tuple[int, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention on [1, N, heads, d]: each row sees itself."""
        outputs, start = [], 0
        for length, alike in groupby(self.lengths):
            rows = len(list(alike))
            part = slice(start, start + rows * length)
            own = [x[0, part].view(rows, length, *x.shape[2:]) for x in (q, k, v)]  # rows T heads d
            outputs.append(_attend(own[0], own[1], own[2], scale).reshape(1, rows * length, *q.shape[2:]))
            start = part.stop
        return torch.cat(outputs, 1)


class SharedPrefix(NamedTuple):
    """Rows that begin alike, laid out as one: the `length` tokens they share once, then each row's own tokens.

    A token sees only what stands before it, so what the shared tokens compute is the same in every row. A batch of
    questions under one instruction costs one instruction, and gradients are those of the whole batch.
    """

    length: int
    rows: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention on [1, P + B S, heads, d]: each row sees the prefix and itself."""
        prefix = [x[:, : self.length] for x in (q, k, v)]
        own = [x[:, self.length :].reshape(self.rows, -1, *x.shape[2:]) for x in (q, k, v)]  # B S heads d
        keys, values = (
            torch.cat([a.expand(self.rows, -1, -1, -1), b], 1) for a, b in zip(prefix[1:], own[1:], strict=True)
        )
        y = _attend(own[0], keys, values, scale)
        return torch.cat([_attend(prefix[0], prefix[1], prefix[2], scale), y.reshape(1, -1, *y.shape[2:])], 1)


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def linear_stand_in(layer: nn.Module) -> StandIn:
    """Return the fused forward of one adapted linear layer."""
    reason = why_not(layer)
    if reason is not None:
        return StandIn(None, reason)
    stock = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _ready(layer):
            return stock(x, *args, **kwargs)
        return linears(x, (linear_plan(layer),))[0]

    return StandIn(forward)


def mlp_stand_in(mlp: Any, config: Any = None) -> StandIn | None:
    """Return the fused forward of a gated MLP; None if the module is none or has no adapter."""
    # By its children: models of diffusers warn of settings that are asked of them by attribute.
    children = dict(mlp.named_children())
    parts: list[Any] = [children.get(name) for name in _MLP_PARTS]
    if not all(isinstance(part, nn.Module) for part in parts) or not hasattr(mlp, "act_fn") or not _adapted(parts):
        return None
    reason = _first_reason(parts, _MLP_PARTS) or unusual_mlp(mlp, config)
    activation = _activation(mlp.act_fn)
    if reason is None and activation is None:
        reason = f"the activation {type(mlp.act_fn).__name__} has no fused form"
    if reason is not None or activation is None:
        return StandIn(None, reason or "")
    stock = mlp.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not all(_ready(part) for part in parts):
            return stock(x, *args, **kwargs)
        gate, up, down = (linear_plan(part) for part in parts)
        return gated_mlp(x, gate, up, down, activation)

    return tried(forward, stock, lambda x: ((x,), {}), parts[0], parts)


def attention_stand_in(attention: Any, config: Any = None) -> StandIn | None:
    """Return the fused forward of causal self-attention with rotary positions; None if the module is none."""
    parts: list[Any] = [getattr(attention, name, None) for name in _PROJECTIONS]
    if not all(isinstance(part, nn.Module) for part in parts) or not _adapted(parts):
        return None
    reason = _first_reason(parts, _PROJECTIONS) or unusual_attention(attention, config)
    if reason is not None:
        return StandIn(None, reason)
    stock = attention.forward
    width = attention.head_dim
    q_norm: Any = getattr(attention, "q_norm", None)
    k_norm: Any = getattr(attention, "k_norm", None)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        row_layout: RowLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        unmasked = attention_mask is None or row_layout is not None
        # Angles of less than a head's width rotate a part of it.
        rotates = position_embeddings is not None and position_embeddings[0].shape[-1] == width
        covered = rotates and unmasked and past_key_values is None
        if not covered or not all(_ready(part) for part in parts):
            return stock(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        assert position_embeddings is not None
        plans = [linear_plan(part) for part in parts]
        q, k, v = (y.view(*y.shape[:2], -1, width) for y in linears(hidden_states, plans[:3]))  # B T H d
        if q_norm is not None:
            q, k = q_norm(q), k_norm(k)
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attend = _attend if row_layout is None else row_layout.attend
        y = attend(q, k, v, attention.scaling)
        return linears(y.flatten(2), plans[3:])[0], None

    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angles = torch.linspace(0, 3, PROBE_TOKENS * (width // 2), device=x.device).view(1, PROBE_TOKENS, -1)
        angles = torch.cat([angles, angles], -1).to(x.dtype)
        return (), {"hidden_states": x, "position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}

    return tried(forward, stock, arguments, parts[0], parts)


def norm_stand_in(norm: Any) -> StandIn | None:
    """Return the fused forward of an RMSNorm with a frozen weight; None if the module is none."""
    if not type(norm).__name__.endswith("RMSNorm") or getattr(norm, "weight", None) is None:
        return None
    if norm.weight.requires_grad:
        return StandIn(None, "its own weights are trained")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None:
        return StandIn(None, "it has no epsilon")
    stock = norm.forward
    for shift in (0.0, 1.0):  # Gemma keeps w - 1
        weight = norm.weight.detach() + shift if shift else norm.weight.detach()

        def forward(x: Tensor, weight: Tensor = weight) -> Tensor:
            return rms_norm(x, weight, float(eps))

        found = tried(forward, stock, lambda x: ((x,), {}), norm, ())
        if found.forward is not None:
            return found
    return StandIn(None, "it is not the RMSNorm of the paper")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T positions on [B, T, H, d]; a GPU has its own kernels for it."""
    if q.device.type == "cpu":
        return causal_attention(q, k, v, scale)
    from torch.nn.attention.bias import causal_lower_right

    mask: Any = causal_lower_right(q.shape[1], k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


def _adapted(parts: list[Any]) -> bool:
    return any(has_adapter(part) for part in parts)


def _ready(layer: Any) -> bool:
    """Whether a layer's adapter is on and lies beside its weight, as when the stand-in was made."""
    return not (getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False))


def _first_reason(parts: list[Any], names: tuple[str, ...]) -> str | None:
    for part, name in zip(parts, names, strict=True):
        reason = why_not(part)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _activation(module: Any) -> Activation | None:
    x = torch.linspace(-40, 40, 401)  # as far as a clamp may begin
    for candidate in ACTIVATIONS.values():
        if torch.allclose(module(x), candidate.forward(x), atol=1e-6):
            return candidate
    return None
