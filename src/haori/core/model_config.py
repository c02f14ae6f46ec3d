"""Entries of a model's configuration that are well known, by what they change.

Code that computes a model in its own way must know every entry that is on: one it has never heard of may change the
result, and only in long texts, say. Those that are not listed here are somebody's own.
"""

from typing import Any

__all__ = ["INERT", "SHAPE", "is_off", "rotary_changes_with_length"]

# They name things, or act in loading, in starting weights, or when other things than logits are asked for.
INERT = frozenset({
    "architectures", "auto_map", "bos_token_id", "cls_token_id", "decoder_start_token_id", "dtype", "eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_llama_config", "label2id", "mask_token_id",
    "model_name", "model_type", "neftune_noise_alpha", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
})  # fmt: skip
# Sizes, biases, activation, norms and positions: what modules and weights show.
SHAPE = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_activation", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "no_rope_layer_interval", "no_rope_layers", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
})  # fmt: skip


def is_off(config: Any, key: str, value: Any, *, is_read: bool) -> bool:
    """Say whether an entry that is not known is switched off.

    Args:
        config: The configuration.
        key: The entry.
        value: Its value.
        is_read: Whether somebody has read what the defaults of this architecture mean.
    """
    if value is None:
        return True
    return is_read and (value is False or (hasattr(type(config), key) and value == getattr(type(config), key)))


def rotary_changes_with_length(config: Any) -> bool:
    """Say whether a model turns all positions otherwise in a longer text (dynamic NTK, LongRoPE)."""
    given = getattr(config, "rope_parameters", None)
    layers = [given, *given.values()] if isinstance(given, dict) else []
    return any(isinstance(layer, dict) and layer.get("rope_type") in ("dynamic", "longrope") for layer in layers)
