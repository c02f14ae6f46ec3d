"""Tokens per second with many requests in flight: the base, adapters side by side, and a thousand of them."""

import time
from itertools import islice
from typing import Any

from provenance import median
from setting import Setting, batch
from workload import adapter_bytes, requests, spread, zipf

PEERS = ("haori", "vllm", "peft")
_WARM = 1
_STREAM_BATCHES = 4
_READ_BYTES = 1 << 30


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens/s over turns, and where known the time to the first token."""
    rates = [turn["tokens"] / turn["seconds"] for turn in turns]
    found: dict[str, Any] = {
        "tokens_per_s": median(rates), "slowest": min(rates), "fastest": max(rates), "samples": rates,
    }  # fmt: skip
    firsts = sorted(request["first_s"] for turn in turns for request in turn.get("requests", ()))
    if firsts:
        found |= {"ttft_p50_ms": 1e3 * median(firsts), "ttft_p95_ms": 1e3 * quantile(firsts, 0.95)}
        found["rss_bytes"] = max(turn["rss_bytes"] for turn in turns)
    return found


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(scenario: str, name: str, found: dict[str, Any]) -> None:
    """Print a line of the table."""
    line = (
        f"  {scenario:12} {name:8} {found['tokens_per_s']:6.0f} tokens/s "
        f"({found['slowest']:.0f} to {found['fastest']:.0f})"
    )
    if "ttft_p50_ms" in found:
        line += f"   first token p50 {found['ttft_p50_ms']:.0f}, p95 {found['ttft_p95_ms']:.0f} ms"
    print(line, flush=True)


def batches(setting: Setting, distinct: dict[str, int]) -> dict[str, Any]:
    """Let all systems take turns at scenarios, given as name to number of distinct adapters."""
    sizes = setting.sizes
    loaded = min(max(distinct.values()), sizes.in_flight)
    setting.need_adapters(loaded)
    specs = {name: (name, setting.spec(loaded=loaded)) for name in PEERS}
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {scenario: {} for scenario in distinct}
    with setting.contenders(specs) as race:
        for number in range(_WARM + sizes.rounds):
            for scenario, count in distinct.items():
                wanted = requests(setting.pool, number, spread(min(count, sizes.in_flight), sizes.in_flight))
                for name in race.running:
                    done = race.turn(name, batch(wanted, sizes.new_tokens))
                    if done is not None and number >= _WARM:
                        turns[scenario].setdefault(name, []).append(done)
    found = {scenario: {name: summary(made) for name, made in by.items()} for scenario, by in turns.items()}
    for scenario, by in found.items():
        for name, figures in by.items():
            show(scenario, name, figures)
    return found


def base_part(setting: Setting) -> dict[str, Any]:
    """Measure the bare base; the peers run without any support for adapters, which is when they are fastest."""
    return batches(setting, {"base": 0})


def adapters_part(setting: Setting) -> dict[str, Any]:
    """Measure 1, 8 and 32 adapters in one batch against the base, and what reading their memory must cost."""
    before = read_rate()
    found = batches(setting, {"base": 0, "adapters1": 1, "adapters8": 8, "adapters32": 32})
    rate = (before + read_rate()) / 2
    base_bytes = sum(file.stat().st_size for file in setting.base.glob("*.safetensors"))
    rows = setting.sizes.in_flight
    extra = min(32, rows) * adapter_bytes()
    floor = {
        "bandwidth_gb_per_s": rate / 1e9, "base_bytes": base_bytes, "adapter_bytes": adapter_bytes(),
        "base_tokens_per_s": rows * rate / base_bytes, "adapters32_tokens_per_s": rows * rate / (base_bytes + extra),
        "ratio": base_bytes / (base_bytes + extra),
    }  # fmt: skip
    print(
        f"  if memory alone counted ({floor['bandwidth_gb_per_s']:.1f} GB/s): base {floor['base_tokens_per_s']:.0f}, "
        f"32 adapters {floor['adapters32_tokens_per_s']:.0f} tokens/s, ratio {floor['ratio']:.2f}"
    )
    if "haori" in found["base"]:
        base = found["base"]["haori"]["tokens_per_s"]
        floor["ratio_at_measured_base"] = 1 / (1 + base * extra / (rows * rate))
        print(f"  the measured base plus reading 32 adapters once a step: ratio {floor['ratio_at_measured_base']:.2f}")
    return {**found, "floor": floor}


def zipf_part(setting: Setting) -> dict[str, Any]:
    """Measure a stream over a thousand adapters, of which 64 fit into memory, against the same stream on the base."""
    sizes = setting.sizes
    setting.need_adapters(sizes.registered)
    draws = zipf(sizes.registered, seed=0)
    count = _STREAM_BATCHES * sizes.in_flight
    turns: dict[str, list[dict[str, Any]]] = {"base": [], "zipf": []}
    with setting.contenders({"haori": ("haori", setting.spec())}) as race:
        for number in range(_WARM + sizes.rounds):
            for scenario, made in turns.items():
                adapters = [None] * count if scenario == "base" else list(islice(draws, count))
                wanted = requests(setting.pool, number, adapters)
                done = race.turn("haori", batch(wanted, sizes.new_tokens, in_flight=sizes.in_flight))
                if done is not None and number >= _WARM:
                    made.append(done)
    if not turns["zipf"]:
        return {}
    found: dict[str, Any] = {scenario: summary(made) for scenario, made in turns.items()}
    loads = sum(turn["loads"] for turn in turns["zipf"])
    found |= {
        "registered": sizes.registered, "resident": sizes.resident,
        "loads_per_request": loads / (count * len(turns["zipf"])),
    }  # fmt: skip
    for scenario in turns:
        show(scenario, "haori", found[scenario])
    print(f"  {found['loads_per_request']:.0%} of the requests waited for an adapter to be read")
    return found


def read_rate() -> float:
    """Return bytes per second at which memory is read by all cores: the best of five sums over a gigabyte."""
    import torch

    data = torch.ones(_READ_BYTES // 4)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, _READ_BYTES / (time.perf_counter() - started))
    return best
