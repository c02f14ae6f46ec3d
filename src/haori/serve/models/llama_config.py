"""Which entries of a configuration the fast runner supports; any other that may change the computation rules it out.

The plan is read off the model's modules and logits are compared, but a short probe cannot show what begins later in a
text, and a newer model may bring an unknown entry. So entries are listed: those that change no logits, those that the
runner supports, and those with one value that it supports.
"""

from typing import Any

from haori.core.model_config import INERT, SHAPE, is_off

__all__ = ["FIXED_ROTARY", "long_probe_tokens", "why_not_config"]

_KNOWN = INERT | SHAPE | {"attention_dropout", "residual_dropout"}
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
    """Return which entry of a configuration the fast runner does not support, or None if it supports all."""
    kind = str(config.model_type)
    entries = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    for key, value in entries.items():
        if key in _KNOWN or key in _OWN.get(kind, ()):
            continue
        if key in _ONE_VALUE:
            allowed = _ONE_VALUE[key]
            if value is not None and value not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                return f"its configuration says {key}: {value!r}"
        elif not is_off(config, key, value, is_read=kind in _OWN):
            return f"its configuration says {key}: {str(value)[:60]!r}, which the fast runner does not know"
    return _why_not_rotary(entries) or _why_not_window(entries, kind)


def long_probe_tokens(config: Any) -> int:
    """Return how long a text must be to show everything that begins late in a text, such as a sliding window.

    0 where nothing in the configuration begins late.
    """
    entries = config.to_dict()
    rotary = entries.get("rope_parameters")
    numbers = {**entries, **(rotary if isinstance(rotary, dict) else {})}
    context = int(config.max_position_embeddings)
    late = {key for key in numbers if any(part in key for part in _BEGINS_LATER) and "layers" not in key}
    starts = [numbers[key] for key in late if type(numbers[key]) is int and 0 < numbers[key] < context]
    return max(starts, default=-1) + 1


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
