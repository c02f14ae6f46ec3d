"""Which entries of a configuration the fast runner honours; any other that may change the computation rules it out.

An entry is read off the model's modules and the logits are compared, but a short probe shows nothing of what begins
later in a text, and a newer model may bring an entry that nobody here has heard of. So entries are listed: those that
change no logits, those that the runner honours, and those with one value that it honours.
"""

from typing import Any

__all__ = ["FIXED_ROTARY", "long_probe_tokens", "why_not_config"]

# They name things, or act in training, in loading, or when other things than logits are asked for.
_INERT = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "decoder_start_token_id", "dtype",
    "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_llama_config", "keys_to_ignore",
    "label2id", "model_name", "model_type", "neftune_noise_alpha", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "residual_dropout", "return_dict", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
# Read off the modules or the weights, or checked here.
_HONOURED = frozenset({
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "no_rope_layer_interval", "no_rope_layers", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "sliding_window", "tie_word_embeddings", "vocab_size",
})  # fmt: skip
_ONE_VALUE = {
    "add_cross_attention": False, "chunk_size_feed_forward": 0, "is_causal": True, "is_decoder": (True, False),
    "is_encoder_decoder": False, "rope_interleaved": False, "use_bidirectional_attention": False, "use_mrope": False,
}  # fmt: skip
# What architectures have beside these. Their attention says for each layer whether a window holds.
_OWN = {
    "llama": frozenset[str](),
    "mistral": frozenset[str](),
    "ministral": frozenset[str](),
    "seed_oss": frozenset({"attention_out_bias"}),
    "qwen2": frozenset({"max_window_layers", "use_sliding_window"}),
    "qwen3": frozenset({"max_window_layers", "use_sliding_window"}),
    "smollm3": frozenset({"use_sliding_window"}),
}
_WINDOW_BY_LAYER = frozenset({"qwen2", "qwen3", "smollm3"})
# All of them are in the frequencies and the factor that the rotary module has worked out.
_ROTARY = frozenset({
    "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "low_freq_factor",
    "max_position_embeddings", "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor",
    "rope_theta", "rope_type", "truncate", "type",
})  # fmt: skip
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
_BEGINS_LATER = ("window", "chunk", "original_max")


def why_not_config(config: Any) -> str | None:
    """Return which entry of a configuration the fast runner does not honour, or None if it honours all."""
    kind = str(config.model_type)
    entries = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    for key, value in entries.items():
        if key in _INERT or key in _HONOURED or key in _OWN.get(kind, ()):
            continue
        if key in _ONE_VALUE:
            allowed = _ONE_VALUE[key]
            if value is not None and value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                return f"its configuration says {key}: {value!r}"
        elif not _is_default(config, kind, key, value):
            return f"its configuration says {key}: {str(value)[:60]!r}, which the fast runner does not know"
    return _why_not_rotary(entries) or _why_not_window(entries, kind)


def long_probe_tokens(config: Any) -> int:
    """Return how long a text must be to show all that begins late: one token more than the longest such number.

    0 where nothing in the configuration begins late.
    """
    entries = config.to_dict()
    rotary = entries.get("rope_parameters")
    numbers = {**entries, **(rotary if isinstance(rotary, dict) else {})}
    context = int(config.max_position_embeddings)
    late = {key for key in numbers if any(part in key for part in _BEGINS_LATER) and "layers" not in key}
    starts = [numbers[key] for key in late if type(numbers[key]) is int and 0 < numbers[key] < context]
    return max(starts, default=-1) + 1


def _is_default(config: Any, kind: str, key: str, value: Any) -> bool:
    """Say whether an entry that is not listed is switched off: as the class has it, None or False.

    Of an architecture that is not listed nobody has read what its defaults mean.
    """
    if value is None:
        return True
    return kind in _OWN and (value is False or (hasattr(type(config), key) and value == getattr(type(config), key)))


def _why_not_rotary(entries: dict[str, Any]) -> str | None:
    rotary = entries.get("rope_parameters")
    if not isinstance(rotary, dict) or any(isinstance(value, dict) for value in rotary.values()):
        return "its rotary angles differ by layer"
    if (kind := rotary.get("rope_type", rotary.get("type", "default"))) not in FIXED_ROTARY:
        return f"its rotary angles change with length ({kind})"
    unknown = sorted(key for key, value in rotary.items() if key not in _ROTARY and value is not None)
    if unknown:
        return f"its rope_parameters say {unknown[0]}, which the fast runner does not know"
    without = entries.get("no_rope_layers")
    return "some of its layers have no rotary angles" if without is not None and not all(without) else None


def _why_not_window(entries: dict[str, Any], kind: str) -> str | None:
    layers = set(entries.get("layer_types") or ())
    if other := sorted(layers - {"full_attention", "sliding_attention"}):
        return f"some of its layers are of the type {other[0]}"
    window = entries.get("sliding_window")
    if window is None or window >= entries["max_position_embeddings"]:
        return None
    if kind in _WINDOW_BY_LAYER and layers == {"full_attention"}:
        return None
    return f"its attention looks back {window:,} tokens only"
