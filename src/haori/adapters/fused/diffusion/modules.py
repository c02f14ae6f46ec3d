"""Fused stand-ins for the parts of the UNets and transformers of diffusers, each tried against its module.

A part is recognised by what it consists of, and measured: see adapters/fused/modules.py. Between the parts of a UNet
pictures stay in channels-last memory, in which a picture is a matrix of places and channels and norms, convolutions
and linear layers need no copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from haori.adapters.fused.attention import full_attention
from haori.adapters.fused.diffusion.convolution import Convolution, why_not_convolution
from haori.adapters.fused.diffusion.kernels import kernels_for
from haori.adapters.fused.diffusion.norm import channels_last, group_norm, pictures, places, working_dtype
from haori.adapters.fused.factors import linear_plan, why_not
from haori.adapters.fused.projections import lora_linears
from haori.adapters.fused.trial import StandIn, tried

__all__ = ["KINDS", "convolution_stand_in"]

_SIDE = (2, 4)  # of the picture in a trial
_ATTENTION_EXTRAS = (
    "spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_q_proj", "add_k_proj", "add_v_proj",
    "to_add_out",
)  # fmt: skip


def resnet_stand_in(block: Any) -> StandIn | None:
    """Return the fused forward of a residual block: twice norm, SiLU and convolution, with the time step between."""
    parts = ("norm1", "norm2", "conv1", "conv2", "nonlinearity", "time_emb_proj")
    if not all(hasattr(block, part) for part in parts):
        return None
    convolutions = [block.conv1, block.conv2] + ([] if block.conv_shortcut is None else [block.conv_shortcut])
    reason = next((why for layer in convolutions if (why := why_not_convolution(layer))), None)
    reason = reason or _unusual_resnet(block) or _trained(block.norm1) or _trained(block.norm2)
    if reason is not None:
        return StandIn(None, reason)
    first, second, *shortcut = (Convolution(layer) for layer in convolutions)
    stock = block.forward

    def forward(input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _ready(*convolutions):
            return stock(input_tensor, temb, *args, **kwargs)
        x = channels_last(input_tensor, working_dtype(input_tensor))
        y = first(group_norm(x, block.norm1, activate=True))
        step = None if temb is None else block.time_emb_proj(block.nonlinearity(temb))  # [B, C or 2 C]
        y = second(_stepped(y, step, block.norm2, modulated=block.time_embedding_norm == "scale_shift"))
        y = y.add_(shortcut[0](x) if shortcut else x)
        return y if block.output_scale_factor == 1.0 else y / block.output_scale_factor

    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        projection = block.time_emb_proj
        step = None if projection is None else x.new_ones(1, projection.in_features)
        return (_picture(x), step), {}

    return tried(forward, stock, arguments, block.norm1, [c for c in convolutions if hasattr(c, "lora_B")])


def _stepped(y: Tensor, step: Tensor | None, norm: nn.GroupNorm, *, modulated: bool) -> Tensor:
    """Return silu(norm(y)) with the time step added before the norm, or as scale and shift behind it."""
    if step is None or not modulated:
        return group_norm(y if step is None else y + step[:, :, None, None], norm, activate=True)
    if not step.requires_grad:
        return group_norm(y, norm, activate=True, modulation=step)
    scale, shift = step[:, :, None, None].chunk(2, 1)
    return nn.functional.silu(group_norm(y, norm, activate=False) * (1 + scale) + shift)


def _unusual_resnet(block: Any) -> str | None:
    if not isinstance(block.nonlinearity, nn.SiLU) or block.time_embedding_norm not in ("default", "scale_shift"):
        return "its activation or its time embedding is another"
    if block.upsample is not None or block.downsample is not None or block.skip_time_act:
        return "it changes the size of pictures"
    return "it has dropout" if block.dropout.p > 0 else None


def transformer_stand_in(block: Any) -> StandIn | None:
    """Return the fused forward of a transformer over a picture's places: norm, projections and blocks between."""
    if not getattr(block, "is_input_continuous", False) or not hasattr(block, "transformer_blocks"):
        return None
    reason = _trained(block.norm)
    if reason is not None:
        return StandIn(None, reason)
    stock = block.forward
    linear = block.use_linear_projection

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, timestep: Any = None,
        added_cond_kwargs: Any = None, class_labels: Any = None, cross_attention_kwargs: Any = None,
        attention_mask: Any = None, encoder_attention_mask: Any = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        others = (added_cond_kwargs, class_labels, cross_attention_kwargs, attention_mask, encoder_attention_mask)
        recomputes = torch.is_grad_enabled() and block.gradient_checkpointing
        if recomputes or return_dict or any(other is not None for other in others):
            return stock(
                hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
                cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
            )  # fmt: skip
        x = channels_last(hidden_states, working_dtype(hidden_states))
        y = group_norm(x, block.norm, activate=False)
        rows = block.proj_in(places(y)) if linear else places(block.proj_in(y))  # [B, HW, D]
        for inner in block.transformer_blocks:
            rows = inner(rows, encoder_hidden_states=encoder_hidden_states, timestep=timestep)
        y = pictures(block.proj_out(rows), x) if linear else block.proj_out(pictures(rows, x))
        return (y + x,)

    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        width = block.config.cross_attention_dim
        text = None if width is None else torch.linspace(-1, 1, 3 * width).view(1, 3, width).to(x)
        return (_picture(x), text), {"return_dict": False}

    return tried(forward, stock, arguments, block.norm, ())


def attention_stand_in(attention: Any) -> StandIn | None:
    """Return the fused forward of attention as UNets have it: queries of places, keys of places or of a text."""
    parts: list[Any] = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v", "to_out")]
    if not (all(isinstance(part, nn.Module) for part in parts) and hasattr(attention, "processor")):
        return None
    if not isinstance(parts[3], nn.ModuleList):
        return None
    parts[3], dropout = parts[3][0], parts[3][1] if len(parts[3]) > 1 else None
    reason = next((why for part in parts if (why := why_not(part))), None) or _unusual_attention(attention, dropout)
    if reason is not None:
        return StandIn(None, reason)
    stock = attention.forward
    heads, scale = attention.heads, (parts[1].out_features // attention.heads) ** -0.5

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if kwargs or attention_mask is not None or hidden_states.ndim != 3 or not _ready(*parts):
            return stock(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        plans = [linear_plan(part) for part in parts]
        if encoder_hidden_states is None:
            found = lora_linears(hidden_states, plans[:3])
        else:
            found = lora_linears(hidden_states, plans[:1]) + lora_linears(encoder_hidden_states, plans[1:3])
        q, k, v = (y.view(*y.shape[:2], heads, -1) for y in found)  # [B, T, H, d]
        return lora_linears(full_attention(q, k, v, scale).flatten(2), plans[3:])[0]

    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if parts[1].in_features == parts[0].in_features:
            return (x,), {}
        width = parts[1].in_features
        return (x, torch.linspace(-1, 1, 3 * width).view(1, 3, width).to(x)), {}

    return tried(forward, stock, arguments, parts[0], parts)


def _unusual_attention(attention: Any, dropout: Any) -> str | None:
    extra = next((name for name in _ATTENTION_EXTRAS if getattr(attention, name, None) is not None), None)
    if extra is not None:
        return f"it has a part {extra}"
    kind = type(attention.processor).__name__
    if kind not in ("AttnProcessor2_0", "AttnProcessor"):
        return f"it computes by {kind}"
    if (
        attention.residual_connection
        or attention.rescale_output_factor != 1.0
        or getattr(attention, "is_causal", False)
    ):
        return "it adds its input, rescales its output or is causal"
    return "it has dropout" if getattr(dropout, "p", 0.0) > 0 else None


def feed_forward_stand_in(block: Any) -> StandIn | None:
    """Return the fused forward of a feed-forward layer with GEGLU."""
    net = getattr(block, "net", None)
    if not isinstance(net, nn.ModuleList) or len(net) < 3 or type(net[0]).__name__ != "GEGLU":
        return None
    parts: list[Any] = [net[0].proj, net[2]]
    reason = next((why for part in parts if (why := why_not(part))), None)
    if reason is None and any(getattr(layer, "p", 0.0) > 0 for layer in net):
        reason = "it has dropout"
    if reason is not None:
        return StandIn(None, reason)
    stock = block.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _ready(*parts):
            return stock(hidden_states, *args, **kwargs)
        inner, outer = (linear_plan(part) for part in parts)
        (both,) = lora_linears(hidden_states, (inner,))
        gated: Tensor = _Geglu.apply(both)  # type: ignore[no-untyped-call]
        return lora_linears(gated, (outer,))[0]

    return tried(forward, stock, lambda x: ((x,), {}), parts[0], parts)


class _Geglu(torch.autograd.Function):
    """left * gelu(right) of [left, right] [..., 2 I]; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        flat = both.reshape(-1, both.shape[-1])
        return kernels_for(both).geglu(flat).view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        d = grad.reshape(-1, grad.shape[-1]).to(both.dtype)
        return kernels_for(d, both).geglu_back(d, both.reshape(-1, both.shape[-1])).view(both.shape)


def convolution_stand_in(layer: Any) -> StandIn:
    """Return the fused forward of one convolution, adapted or frozen."""
    reason = why_not_convolution(layer)
    if reason is not None:
        return StandIn(None, reason)
    convolution, stock = Convolution(layer), layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.ndim != 4 or not _ready(layer):
            return stock(x, *args, **kwargs)
        return convolution(x)

    return StandIn(forward)


def group_norm_stand_in(norm: Any) -> StandIn | None:
    """Return the fused forward of a group norm over pictures."""
    if type(norm) is not nn.GroupNorm or _trained(norm) is not None:
        return None
    stock = norm.forward
    return StandIn(lambda x: group_norm(x, norm, activate=False) if x.ndim == 4 else stock(x))


KINDS: tuple[tuple[str, Callable[[Any], StandIn | None]], ...] = (
    ("residual blocks", resnet_stand_in),
    ("picture transformers", transformer_stand_in),
    ("attention blocks", attention_stand_in),
    ("MLPs", feed_forward_stand_in),
    ("group norms", group_norm_stand_in),
)


def _ready(*layers: Any) -> bool:
    """Whether the layers' adapters are on and lie beside their weights, as when the stand-in was made."""
    return not any(getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False) for layer in layers)


def _trained(norm: Any) -> str | None:
    if type(norm) is not nn.GroupNorm or norm.weight is None:
        return f"{type(norm).__name__} is not a plain group norm"
    return "its own norms are trained" if norm.weight.requires_grad or norm.bias.requires_grad else None


def _picture(x: Tensor) -> Tensor:
    """Turn a trial's input [1, P, C] into a picture [1, C, H, W]."""
    return x.transpose(1, 2).reshape(1, -1, *_SIDE)
