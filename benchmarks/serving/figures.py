"""The figures that count, computed from what the parts measured, and the bars they are held against."""

from typing import Any

BARS: dict[str, tuple[str, float]] = {
    "base_vs_vllm": (">=", 1.1), "adapters8_vs_base": (">=", 0.9), "adapters32_vs_base": (">=", 0.7),
    "adapters8_vs_vllm": (">=", 4.5), "adapters32_vs_vllm": (">=", 3.2), "adapters32_vs_peft": (">=", 8.0),
    "single_stream_vs_llamacpp": (">=", 0.7), "cold_load_ms": ("<=", 60.0), "zipf1000_vs_base": (">=", 0.7),
    "fairness_p95_ratio": ("<=", 2.0), "ttft_adapter_vs_base": ("<=", 1.5), "soak_growth": ("<=", 1.05),
    "start_s": ("<=", 5.0),
}  # fmt: skip
_RATIOS = {
    "base_vs_vllm": ("base.base.haori", "base.base.vllm"),
    "adapters1_vs_base": ("adapters.adapters1.haori", "adapters.base.haori"),
    "adapters8_vs_base": ("adapters.adapters8.haori", "adapters.base.haori"),
    "adapters32_vs_base": ("adapters.adapters32.haori", "adapters.base.haori"),
    "adapters8_vs_vllm": ("adapters.adapters8.haori", "adapters.adapters8.vllm"),
    "adapters32_vs_vllm": ("adapters.adapters32.haori", "adapters.adapters32.vllm"),
    "adapters32_vs_peft": ("adapters.adapters32.haori", "adapters.adapters32.peft"),
    "zipf1000_vs_base": ("zipf.zipf", "zipf.base"),
}
_VALUES = {
    "adapters32_floor": "adapters.floor.ratio",
    "adapters32_floor_at_measured_base": "adapters.floor.ratio_at_measured_base",
    "single_stream_vs_llamacpp": "stream.int8_vs_Q8_0",
    "single_stream_int4_vs_llamacpp": "stream.int4_vs_Q4_1",
    "cold_load_ms": "cold.dropped.load_ms",
    "cold_load_cached_ms": "cold.cached.load_ms",
    "ttft_p50_ms": "adapters.adapters32.haori.ttft_p50_ms",
    "ttft_p95_ms": "adapters.adapters32.haori.ttft_p95_ms",
    "fairness_p95_ratio": "fairness.p95_ratio",
    "ttft_adapter_vs_base": "turns.ttft_adapter_vs_base",
    "soak_growth": "soak.growth",
    "start_s": "start.median_s",
    "start_first_s": "start.first_s",
    "perplexity_bf16": "weights.bf16.perplexity",
    "perplexity_int8": "weights.int8.perplexity",
    "perplexity_int4": "weights.int4.perplexity",
}


def figures(parts: dict[str, Any]) -> dict[str, float | None]:
    """Return the figures; None where what they need was not measured."""
    found: dict[str, float | None] = {}
    for key, (above, below) in _RATIOS.items():
        numerator, denominator = _at(parts, f"{above}.tokens_per_s"), _at(parts, f"{below}.tokens_per_s")
        found[key] = numerator / denominator if numerator and denominator else None
    found |= {key: _at(parts, path) for key, path in _VALUES.items()}
    return {key: None if value is None else round(value, 3) for key, value in found.items()}


def show(found: dict[str, float | None]) -> None:
    """Print each figure beside its bar."""
    for key, value in found.items():
        sign, bar = BARS.get(key, ("", 0.0))
        met = (
            "" if not sign or value is None else "" if (value >= bar) == (sign == ">=") or value == bar else "  MISSED"
        )
        print(f"{key:36} {'-' if value is None else f'{value:.2f}':>8}  {f'{sign} {bar:g}' if sign else ''}{met}")


def _at(parts: dict[str, Any], path: str) -> float | None:
    place: Any = parts
    for step in path.split("."):
        place = place.get(step) if isinstance(place, dict) else None
    return None if place is None else float(place)
