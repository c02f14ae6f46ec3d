"""What about an attention block, an MLP or a model the fused forms do not know, from its parts and its configuration.

A stand-in is also tried against its module, but a small random input shows nothing of what begins late in a text, acts
on large numbers only (a clamp, a cap), or is drawn at random.
"""

from typing import Any

from torch import nn

from haori.core.model_config import INERT, SHAPE, is_off

__all__ = ["text_config", "unusual_attention", "unusual_mlp"]

# Architectures whose attention and MLP in transformers were read: no other entry changes what these compute.
_READ = frozenset({
    "gemma", "gemma2", "gemma3_text", "granite", "llama", "ministral", "mistral", "mixtral", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "smollm3",
})  # fmt: skip
_DROPOUTS = ("dropout", "pdrop")
_ELSEWHERE = ("attention", "classifier", "embd", "embed", "router", "summary")  # attention says its own
# Of every transformers model, or outside attention and MLP.
_GENERAL = frozenset({"chunk_size_feed_forward", "is_causal", "is_encoder_decoder", "use_bidirectional_attention"})
_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NORMS = ({"q_norm", "k_norm"}, set[str]())
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text part, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def unusual_attention(attention: Any, config: Any) -> str | None:
    """Say what about an attention module the fused form does not know."""
    if not (hasattr(attention, "head_dim") and hasattr(attention, "scaling")):
        return "it has no head_dim or scaling"
    if getattr(attention, "attn_logit_softcapping", None):
        return "it caps its scores"
    if getattr(attention, "attention_dropout", 0.0):
        return "it has attention dropout"
    if not getattr(attention, "is_causal", True) or getattr(config, "is_causal", True) is False:
        return "it is not causal"
    if not getattr(attention, "use_rope", True):
        return "it has no rotary angles"
    if _parts(attention) - _PROJECTIONS not in _NORMS:
        return "it has parts of its own"
    norm = getattr(attention, "q_norm", None)
    if norm is not None and norm.weight.shape[-1] != attention.head_dim:
        return "it normalises all heads together"
    kind = getattr(config, "_attn_implementation", "sdpa")
    if kind not in ("sdpa", "eager"):
        return f"it computes attention by {kind}, which keeps windows without a mask"
    return _unknown_entry(config)


def unusual_mlp(mlp: Any, config: Any) -> str | None:
    """Say what about a gated MLP the fused form does not know."""
    if _parts(mlp) != _MLP:
        return "it has parts of its own"
    return _unknown_entry(config)


def _parts(module: nn.Module) -> set[str]:
    """Return the names of a module's parts and of the parameters that it has itself."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return {name for name, _ in module.named_children()} | own


def _unknown_entry(config: Any) -> str | None:
    if config is None:
        return None
    is_read = config.model_type in _READ
    for key, value in config.to_dict().items():
        if any(part in key for part in _DROPOUTS):
            if value and not key.startswith(_ELSEWHERE):
                return f"its configuration says {key}: {value}"
        elif key not in INERT and key not in SHAPE and not key.startswith("_"):
            known = key in _GENERAL or (is_read and hasattr(type(config), key))
            if not known and not is_off(config, key, value, is_read=is_read):
                return f"its configuration says {key}: {str(value)[:40]!r}, which is not known here"
    return None
