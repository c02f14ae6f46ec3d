"""The weights of a Llama-like model, laid out for serving: q, k and v in one matrix, gate and up in another.

A model is recognised by its parts, never by its class: Llama, Mistral, Qwen2, Qwen3, SmolLM. Whether it was understood
is measured afterwards by the caller, who compares logits with the model's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haori.serve.packed_adapter import Site
from haori.serve.weight import Weight, WeightFormat, pack_weight

__all__ = ["LayerWeights", "LlamaWeights", "read_llama", "why_not_llama"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class LayerWeights:
    """One block. Linear weights come in the order of the sites: q k v, o, gate up, down."""

    linears: tuple[Weight, Weight, Weight, Weight]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    attention_norm: tuple[str, Tensor]
    mlp_norm: tuple[str, Tensor]
    q_norm: tuple[str, Tensor] | None
    k_norm: tuple[str, Tensor] | None


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model.

    Attributes:
        layers: Its blocks.
        sites: Four linear sites for each block.
        embedding: V D.
        embedding_name: Its parameter name.
        head: D to V.
        head_tied: The head is the embedding.
        final_norm: Name and weight.
        epsilon: Of the norms.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: Numbers in a head.
        cosines: Of the rotary angles, [context length, head width].
        sines: The same, negative in the first half of the head.
        scale: Of attention scores.
        context_length: Longest sequence in tokens.
    """

    layers: tuple[LayerWeights, ...]
    sites: tuple[Site, ...]
    embedding: Tensor
    embedding_name: str
    head: Weight
    head_tied: bool
    final_norm: tuple[str, Tensor]
    epsilon: float
    heads: int
    kv_heads: int
    head_width: int
    cosines: Tensor
    sines: Tensor
    scale: float
    context_length: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations."""
        return self.embedding.dtype

    @property
    def vector_names(self) -> tuple[str, ...]:
        """Names of all norm weights."""
        per_layer = [
            named[0]
            for layer in self.layers
            for named in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            if named is not None
        ]
        return (*per_layer, self.final_norm[0])


def why_not_llama(model: nn.Module) -> str | None:
    """Return the reason why a model cannot be laid out so, or None."""
    body: Any = getattr(model, "model", None)
    config: Any = getattr(model, "config", None)
    wanted = ("layers", "embed_tokens", "norm", "rotary_emb")
    if body is None or not all(hasattr(body, name) for name in wanted) or not hasattr(model, "lm_head"):
        return "its parts are not those of a Llama-like model"
    if body.rotary_emb.rope_type not in _FIXED_ROTARY:
        return f"its rotary angles change with length ({body.rotary_emb.rope_type})"
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = {name for name, _ in layer.named_children()}
        if parts != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return "its blocks have parts of their own"
        if not all(type(getattr(attention, name, None)) is nn.Linear for name in _PROJECTIONS):
            return "its attention projections are not plain linear layers"
        if not all(type(getattr(mlp, name, None)) is nn.Linear for name in _MLP):
            return "its MLP is not three plain linear layers"
        if type(getattr(mlp, "act_fn", None)).__name__ not in {"SiLU", "SiLUActivation"}:
            return "its activation is not SiLU"
        window = getattr(attention, "sliding_window", None)
        if window is not None and window < context_length(config):
            return f"its attention looks back {window:,} tokens only"
    return None


def context_length(config: Any) -> int:
    """Return the longest sequence that a configuration allows."""
    return int(config.max_position_embeddings)


def read_llama(model: Any, form: WeightFormat, longest: int) -> LlamaWeights:
    """Take a model apart. Its linear weights are emptied on the way, so that nothing is held twice.

    Args:
        model: A model for which `why_not_llama` found no reason.
        form: Format of the linear weights.
        longest: Longest sequence to be prepared for, in tokens.
    """
    body, config = model.model, model.config
    first = body.layers[0].self_attn
    longest = min(longest, context_length(config))
    embedding = body.embed_tokens.weight
    positions = torch.arange(longest, device=embedding.device)[None]
    with torch.no_grad():
        cosines, sines = body.rotary_emb(embedding[:1, None].float(), positions)  # 1 T d, in fp32
    tied = model.lm_head.weight.data_ptr() == embedding.data_ptr()
    head = pack_weight(model.lm_head.weight.data, form)
    names = {id(module): name for name, module in model.named_modules()}
    sites: list[Site] = []
    layers = []
    for layer in body.layers:
        groups = _groups(layer)
        sites += [_site(group, names) for group in groups]
        layers.append(_read_layer(layer, groups, names, form))
    return LlamaWeights(
        layers=tuple(layers),
        sites=tuple(sites),
        embedding=embedding.data,
        embedding_name=f"{names[id(body.embed_tokens)]}.weight",
        head=head,
        head_tied=tied,
        final_norm=_norm(body.norm, names),
        epsilon=float(config.rms_norm_eps),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_width=int(first.head_dim),
        cosines=cosines[0].to(embedding.dtype),
        sines=(sines[0] * _first_half_negative(int(first.head_dim))).to(embedding.dtype),
        scale=float(first.scaling),
        context_length=longest,
    )


def _first_half_negative(width: int) -> Tensor:
    return torch.cat([-torch.ones(width // 2), torch.ones(width // 2)])


def _groups(layer: Any) -> tuple[tuple[nn.Linear, ...], ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _site(group: tuple[nn.Linear, ...], names: dict[int, str]) -> Site:
    return Site(tuple(names[id(m)] for m in group), group[0].in_features, tuple(m.out_features for m in group))


def _norm(norm: Any, names: dict[int, str]) -> tuple[str, Tensor]:
    return f"{names[id(norm)]}.weight", norm.weight.data


def _read_layer(
    layer: Any, groups: tuple[tuple[nn.Linear, ...], ...], names: dict[int, str], form: WeightFormat
) -> LayerWeights:
    weights, biases = [], []
    for group in groups:
        weights.append(pack_weight(torch.cat([module.weight.data for module in group]), form))
        held = [module.bias for module in group]
        zeros = [torch.zeros_like(module.weight[:, 0]) for module in group]
        parts = [zero if bias is None else bias.data for bias, zero in zip(held, zeros, strict=True)]
        biases.append(torch.cat(parts) if any(bias is not None for bias in held) else None)
        for module in group:
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    attention = layer.self_attn
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LayerWeights(
        linears=(weights[0], weights[1], weights[2], weights[3]),
        biases=(biases[0], biases[1], biases[2], biases[3]),
        attention_norm=_norm(layer.input_layernorm, names),
        mlp_norm=_norm(layer.post_attention_layernorm, names),
        q_norm=None if q_norm is None else _norm(q_norm, names),
        k_norm=None if k_norm is None else _norm(k_norm, names),
    )
