"""What serving needs to know of a Llama-like model besides its weights: plain data that can be kept on disk.

A model is recognised by its parts, never by its class: Llama, Mistral, Qwen2, Qwen3, SmolLM. A part more, or an entry
of the configuration that `llama_config` does not know, rules it out. Whether it was understood is measured afterwards
by the caller, who compares logits with the model's own.
"""

from typing import Any

import torch
from torch import nn

from haori.core.records import Record
from haori.serve.models.llama_config import FIXED_ROTARY, why_not_config

__all__ = ["BlockPlan", "LlamaPlan", "plan_llama", "why_not_llama"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class BlockPlan(Record):
    """Names of one block's parts; linear modules in the groups q k v, o, gate up, down."""

    groups: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    attention_norm: str
    mlp_norm: str
    q_norm: str | None
    k_norm: str | None


class LlamaPlan(Record):
    """A whole model. Names are those of modules, without `.weight`.

    Attributes:
        blocks: Its blocks.
        linears: (D_out, D_in) of every linear module but the head.
        biased: Linear modules that have a bias.
        embedding: The embedding.
        head: The head, or None where it is the embedding.
        final_norm: The norm before the head.
        epsilon: Of the norms.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: Numbers in a head.
        scale: Of attention scores.
        frequencies: Rotary angle per position, for each pair of numbers in a head.
        angle_scale: Factor of cosines and sines.
        context_length: Longest sequence in tokens.
    """

    blocks: tuple[BlockPlan, ...]
    linears: dict[str, tuple[int, int]]
    biased: frozenset[str]
    embedding: str
    head: str | None
    final_norm: str
    epsilon: float
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    frequencies: tuple[float, ...]
    angle_scale: float
    context_length: int

    @property
    def head_name(self) -> str:
        """Return the full name of the head's weight, by which an adapter knows it even where it is the embedding."""
        return f"{self.head or 'lm_head'}.weight"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return the full names of all parameters."""
        norms = [
            name
            for block in self.blocks
            for name in (block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm)
            if name is not None
        ]
        heads = [] if self.head is None else [self.head]
        modules = (self.embedding, *self.linears, *norms, self.final_norm, *heads)
        return (*(f"{name}.weight" for name in modules), *(f"{name}.bias" for name in sorted(self.biased)))


def why_not_llama(model: nn.Module) -> str | None:
    """Return the reason why a model cannot be served as a Llama-like one, or None."""
    body: Any = getattr(model, "model", None)
    config: Any = getattr(model, "config", None)
    if _parts(model) != {"model", "lm_head"} or _parts(body) != {"layers", "embed_tokens", "norm", "rotary_emb"}:
        return "its parts are not those of a Llama-like model"
    head: Any = model.lm_head
    if type(body.embed_tokens) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        return "its embedding or its head is not a plain one"
    for layer in body.layers:
        if (reason := _why_not_layer(layer)) is not None:
            return reason
    if (reason := why_not_config(config)) is not None:
        return reason
    for layer in body.layers:
        window = getattr(layer.self_attn, "sliding_window", None)
        if window is not None and window < _context_length(config):
            return f"its attention looks back {window:,} tokens only"
    norms = [module for name, module in body.named_modules() if name.rpartition(".")[2].endswith("norm")]
    if not all(_is_rms_norm(norm, float(getattr(config, "rms_norm_eps", -1.0))) for norm in norms):
        return "its norms are not RMSNorms of one epsilon"
    if len({_sizes(layer.self_attn, config) for layer in body.layers}) != 1:
        return "its layers differ in their heads"
    return _why_not_rotary(body.rotary_emb, int(body.layers[0].self_attn.head_dim), _context_length(config))


def _parts(module: Any) -> set[str]:
    """Return the names of a module's parts and of the parameters it has itself."""
    if not isinstance(module, nn.Module):
        return set()
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return {name for name, _ in module.named_children()} | set(own)


def _why_not_layer(layer: Any) -> str | None:
    if _parts(layer) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return "its blocks have parts of their own"
    attention, mlp = layer.self_attn, layer.mlp
    if not all(type(getattr(attention, name, None)) is nn.Linear for name in _PROJECTIONS):
        return "its attention projections are not plain linear layers"
    if _parts(attention) - {*_PROJECTIONS} not in (set(), {"q_norm", "k_norm"}):
        return "its attention has parts of its own"
    if not all(hasattr(attention, name) for name in ("head_dim", "scaling")):
        return "its attention does not say how wide its heads are, and how it scales scores"
    if not getattr(attention, "is_causal", True):
        return "its attention is not causal"
    if not getattr(attention, "use_rope", True):
        return "some of its layers have no rotary angles"
    if getattr(attention, "attn_logit_softcapping", None):
        return "its attention caps its scores"
    if not all(type(getattr(mlp, name, None)) is nn.Linear for name in _MLP):
        return "its MLP is not three plain linear layers"
    if _parts(mlp) - {*_MLP} != {"act_fn"}:
        return "its MLP has parts of its own"
    if type(mlp.act_fn).__name__ not in {"SiLU", "SiLUActivation"}:
        return "its activation is not SiLU"
    return None


def _is_rms_norm(norm: Any, epsilon: float) -> bool:
    if not type(norm).__name__.endswith("RMSNorm") or _parts(norm) != {"weight"}:
        return False
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", -1.0))) == epsilon


def _sizes(attention: Any, config: Any) -> tuple[Any, ...]:
    """Return what must be the same in all layers, and fit the configuration."""
    width = int(attention.head_dim)
    heads = (attention.q_proj.out_features / width, attention.k_proj.out_features / width)
    fits = heads == (config.num_attention_heads, config.num_key_value_heads)
    norms = {
        tuple(norm.weight.shape) == (width,)
        for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        if norm is not None
    }
    return (width, float(attention.scaling), *heads) if fits and norms <= {True} else (id(attention), id(norms))


@torch.no_grad()
def _why_not_rotary(rotary: Any, width: int, context: int) -> str | None:
    """Compare a rotary module's angles, to the end of the context, with those that follow from its frequencies."""
    if rotary.rope_type not in FIXED_ROTARY:
        return f"its rotary angles change with length ({rotary.rope_type})"
    frequencies = rotary.inv_freq.float()
    if 2 * len(frequencies) != width:
        return "its rotary angles turn a part of each head only"
    early = list(range(0, min(context, 64)))
    late = [int(context * share / 32) for share in range(32)]
    positions = torch.tensor([[*early, *late, context - 1]], device=frequencies.device)
    found = rotary(torch.zeros(1, device=frequencies.device), positions)
    angles = positions[..., None].float() * frequencies
    for given, ours in zip(found, (angles.cos(), angles.sin()), strict=True):
        expected = torch.cat([ours, ours], -1) * rotary.attention_scaling
        if given.shape != expected.shape or not torch.allclose(given.float(), expected, atol=1e-4):
            return "its rotary angles are not those of its frequencies"
    return None


def plan_llama(model: Any) -> LlamaPlan:
    """Read the plan off a model for which `why_not_llama` found no reason."""
    body, config = model.model, model.config
    names = {id(module): name for name, module in model.named_modules()}
    tied = model.lm_head.weight.data_ptr() == body.embed_tokens.weight.data_ptr()
    blocks, linears = [], {}
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        modules = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        linears.update({module: names[id(module)] for group in modules for module in group})
        groups = [tuple(names[id(module)] for module in group) for group in modules]
        blocks.append(
            BlockPlan(
                groups=(groups[0], groups[1], groups[2], groups[3]),
                attention_norm=names[id(layer.input_layernorm)],
                mlp_norm=names[id(layer.post_attention_layernorm)],
                q_norm=names.get(id(getattr(attention, "q_norm", None))),
                k_norm=names.get(id(getattr(attention, "k_norm", None))),
            )
        )
    first = body.layers[0].self_attn
    return LlamaPlan(
        blocks=tuple(blocks),
        linears={name: (module.out_features, module.in_features) for module, name in linears.items()},
        biased=frozenset(name for module, name in linears.items() if module.bias is not None),
        embedding=names[id(body.embed_tokens)],
        head=None if tied else names[id(model.lm_head)],
        final_norm=names[id(body.norm)],
        epsilon=float(config.rms_norm_eps),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_width=int(first.head_dim),
        scale=float(first.scaling),
        frequencies=tuple(body.rotary_emb.inv_freq.float().tolist()),
        angle_scale=float(body.rotary_emb.attention_scaling),
        context_length=_context_length(config),
    )


def _context_length(config: Any) -> int:
    return int(config.max_position_embeddings)
