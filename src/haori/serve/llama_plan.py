"""What must be known of a Llama-like model, besides its weights, to serve it: plain data that can be kept on disk.

A model is recognised by its parts, never by its class: Llama, Mistral, Qwen2, Qwen3, SmolLM. Whether it was understood
is measured afterwards by the caller, who compares logits with the model's own.
"""

from typing import Any

from torch import nn

from haori.core.records import Record

__all__ = ["BlockPlan", "LlamaPlan", "plan_llama", "why_not_llama"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


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
        if window is not None and window < _context_length(config):
            return f"its attention looks back {window:,} tokens only"
    return None


def plan_llama(model: Any) -> LlamaPlan:
    """Read from a model, for which `why_not_llama` found no reason, what its weights do not say."""
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
