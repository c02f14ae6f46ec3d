"""How long requests wait: for an adapter that is only on disk, and beside another adapter's crowd."""

import os
from pathlib import Path
from typing import Any

from provenance import median
from setting import Setting, batch
from throughput import quantile
from workload import adapter_folder, requests

_OTHERS = 8
_HOT_FACTOR = 10
_TURNS_EACH = 8  # requests of each of the others' places in a turn


def cold_part(setting: Setting) -> dict[str, Any]:
    """Measure what it costs a lone request that its adapter is not in memory.

    A request is sent twice; the second finds the adapter in memory, and the difference of the times to the first
    token is the time from submission to being in memory. Half of all that is done with the file in the page cache,
    half with it dropped from there.
    """
    count = setting.sizes.cold
    setting.need_adapters(2 * count)
    found: dict[str, Any] = {}
    with setting.contenders({"haori": ("haori", setting.spec())}) as race:
        race.turn("haori", batch(requests(setting.pool, 0, [None] * 4), 2))
        for kind, first in (("cached", 0), ("dropped", count)):
            differences, totals, kept = [], [], 0
            for number in range(first, first + count):
                file = adapter_folder(setting.adapters, number) / "adapter_model.safetensors"
                if kind == "cached":
                    file.read_bytes()
                else:
                    kept += not drop(file)
                order = batch(requests(setting.pool, number, [number]), 2)
                cold, warm = race.turn("haori", order), race.turn("haori", order)
                if cold is None or warm is None:
                    return {}
                if (cold["loads"], warm["loads"]) != (1, 0):
                    raise RuntimeError(f"{cold['loads']} and {warm['loads']} loads, not 1 and 0")
                totals.append(1e3 * cold["requests"][0]["first_s"])
                differences.append(totals[-1] - 1e3 * warm["requests"][0]["first_s"])
            found[kind] = {
                "load_ms": median(differences), "p95_ms": quantile(differences, 0.95),
                "first_token_ms": median(totals), "samples": differences, "files_not_dropped": kept,
            }  # fmt: skip
            print(
                f"  file {kind:8} {found[kind]['load_ms']:6.1f} ms to memory (p95 {found[kind]['p95_ms']:.1f}), "
                f"{found[kind]['first_token_ms']:.1f} ms to the first token"
                f"{f'; {kept} files stayed in the page cache' if kept else ''}", flush=True,
            )  # fmt: skip
    return found


def drop(file: Path) -> bool:
    """Drop a file from the page cache; say whether its beginning is gone from there."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        return False
    finally:
        os.close(handle)


def fairness_part(setting: Setting) -> dict[str, Any]:
    """Measure the latency of 8 adapters that fill the batch, without and with one more at ten times their load.

    Each keeps a fixed number of requests in flight; the hot one keeps ten times as many as each of the others. First
    come, first served, everyone's latency would grow with the requests in flight, to 2.25 times.
    """
    sizes = setting.sizes
    places = max(1, sizes.in_flight // _OTHERS)
    setting.need_adapters(_OTHERS + 1)
    latencies: dict[str, list[float]] = {"without": [], "with": []}
    with setting.contenders({"haori": ("haori", setting.spec())}) as race:
        for number in range(1 + max(1, sizes.rounds // 2)):
            for kind, made in latencies.items():
                groups: list[dict[str, Any]] = [
                    {"requests": requests(setting.pool, number * _OTHERS + n, [n] * places * _TURNS_EACH),
                     "in_flight": places}
                    for n in range(_OTHERS)
                ]  # fmt: skip
                if kind == "with":
                    crowd = requests(setting.pool, number, [_OTHERS] * 320)
                    groups.append({"requests": crowd, "in_flight": _HOT_FACTOR * places, "background": True})
                done = race.turn("haori", {"groups": groups, "new_tokens": sizes.new_tokens})
                if done is not None and number:
                    made += [request["latency_s"] for request in done["requests"]]
    if not latencies["with"]:
        return {}
    found: dict[str, Any] = {
        kind: {"p50_s": median(made), "p95_s": quantile(made, 0.95), "requests": len(made)}
        for kind, made in latencies.items()
    }
    found["p95_ratio"] = found["with"]["p95_s"] / found["without"]["p95_s"]
    for kind in latencies:
        print(f"  {kind:8} the crowd: others p50 {found[kind]['p50_s']:.2f} s, p95 {found[kind]['p95_s']:.2f} s")
    return found
