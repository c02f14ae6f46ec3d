"""Steps of many tenants over one base: rows of all in one forward and backward, against one tenant after another.

    multi_train_8x32     8 tenants of 32 tokens each: time of taking turns over time of the pool's choice (it mixes)
    multi_train_8x512    the same at 512 tokens, where the pool's choice is to take turns: choosing costs nothing
    grid                 time of turns over time of mixing, whatever the pool would choose, by tenants and tokens, for
                         steps of at most 2,048 tokens in all; each way twice
    crossover_tokens     most tokens a tenant at which mixing 8 of them gains 3% or more
    tenants_memory_x     memory of each further rank-16 tenant after a step, in sizes of its adapter

Both ways run alternately in one process over one base; the median counts. Runs alone too: `--smoke` on a tiny model.
"""

import argparse
import json
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from provenance import median

from haori.bases import find_base
from haori.jobs.tenants.pool import TrainingPool
from haori.jobs.tenants.records import AdamParams, AdapterSpec, Datum

__all__ = ["multi_train"]

_GAIN = 1.03
_ALL = 1 << 20
_GRID_TOKENS, _GRID_ROUNDS = 2048, 2
_WARM = 2  # tenants whose memory is not counted: an allocator's first pages


def multi_train(
    base: str,
    *,
    rounds: int = 5,
    tenants: tuple[int, ...] = (2, 4, 8, 32),
    tokens: tuple[int, ...] = (32, 64, 128, 256, 512),
) -> dict[str, Any]:
    """Measure every part.

    Args:
        base: A base's name or folder.
        rounds: How often each step is timed.
        tenants: Numbers of tenants in the grid.
        tokens: Tokens of each tenant in the grid.
    """
    found = find_base(base)
    pool = TrainingPool(found, micro_batch_tokens=_ALL)
    try:
        chosen = pool.mixed_tokens
        memory = _memory(pool, max(8, *tenants))
        result = {
            "multi_train_8x32": _gain(pool, 8, 32, chosen, rounds),
            "multi_train_8x512": _gain(pool, 8, min(512, found.context_length), chosen, rounds),
            **memory,
        }
        sizes = [(n, t) for n in tenants for t in tokens if n * t <= _GRID_TOKENS]
        grid = {f"{n}x{t}": _gain(pool, n, t, _ALL, _GRID_ROUNDS, warm=False) for n, t in sizes}
        gains = [t for t in tokens if grid.get(f"8x{t}", 0.0) >= _GAIN]
        return {**result, "crossover_tokens": max(gains, default=0), "mixed_tokens": chosen, "grid": grid}
    finally:
        pool.close()


def _memory(pool: TrainingPool, count: int) -> dict[str, float]:
    """Open tenants 0 to `count` and let each make a step; return what a further one takes when it is at rest."""
    before = size = 0
    for number in range(max(count, _WARM + 1)):
        if number == _WARM:
            before = _resident_bytes()
        pool.create(str(number), AdapterSpec(rank=16, seed=number)).result()
        pool.forward_backward(str(number), [_row(32, number)], "cross_entropy").result()
        pool.optim_step(str(number), AdamParams()).result()
    size = pool.status().adapter_bytes[str(number)]
    each = (_resident_bytes() - before) / (number + 1 - _WARM)
    return {"tenants_memory_x": each / size, "tenants_memory_mb": each / 1e6, "adapter_mb": size / 1e6}


def _gain(pool: TrainingPool, tenants: int, tokens: int, mixed_tokens: int, rounds: int, *, warm: bool = True) -> float:
    """Return the median time of taking turns over that with `mixed_tokens`."""
    times: dict[int, list[float]] = {0: [], mixed_tokens: []}
    for number in range(0 if warm else 1, rounds + 1):
        for way, taken in times.items():
            seconds = _step(pool, tenants, tokens, way)
            if number:  # the first round warms up
                taken.append(seconds)
    gain = median(times[0]) / median(times[mixed_tokens])
    print(f"  {tenants} x {tokens}: {gain:.2f}", file=sys.stderr, flush=True)
    return gain


def _step(pool: TrainingPool, tenants: int, tokens: int, mixed_tokens: int) -> float:
    """Return the seconds from when all requests wait to when all are answered, and their steps made."""
    pool.mixed_tokens = mixed_tokens
    gate = pool.forward_backward("0", [_row(64, 0)], "cross_entropy", forward_only=True)
    futures = [pool.forward_backward(str(n), [_row(tokens, n)], "cross_entropy") for n in range(tenants)]
    gate.result()
    begun = time.perf_counter()
    futures += [pool.optim_step(str(n), AdamParams()) for n in range(tenants)]
    wait(futures)
    for future in futures:
        future.result()
    return time.perf_counter() - begun


def _row(tokens: int, seed: int) -> Datum:
    ids = np.random.default_rng(seed).integers(5, 250, tokens + 1)
    return Datum(ids[:-1], {"target_tokens": ids[1:], "weights": np.ones(tokens, np.float32)})


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads memory from /proc, which only Linux has.")


def main() -> None:
    """Measure alone, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tenants", default="2,4,8,32", help="numbers of tenants in the grid")
    parser.add_argument("--tokens", default="32,64,128,256,512", help="tokens of each tenant in the grid")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one round, to see that it runs")
    given = parser.parse_args()
    grid = [tuple(int(word) for word in text.split(",")) for text in (given.tenants, given.tokens)]
    if given.smoke:
        import tempfile

        from tiny import tiny_base

        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(multi_train(str(tiny_base(Path(place) / "base")), rounds=1, tenants=(2,), tokens=(32,))))
        return
    print(json.dumps(multi_train(given.base, rounds=given.rounds, tenants=grid[0], tokens=grid[1]), indent=1))


if __name__ == "__main__":
    main()
