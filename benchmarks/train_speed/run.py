"""Training speed and memory of Haori against PEFT with the Trainer of transformers, and against full fine-tuning.

SmolLM2-135M-Instruct, rank 16 on all linear layers, bf16 base, on this machine's CPU:

    dense   4 x 512 tokens a step, every token labelled
    real    the demo's reviews, about 16 rows a step, only answers labelled

Each contender is a process of its own (so that its peak memory is its own); they take turns, step by step. First a
search finds PEFT's best setting. The floor is what 4 P T operations take at the rate of this machine's bf16 matrix
products, measured in the same run. Prints tables and, as its last line, one JSON object; `--write` keeps it, draws the
chart and puts it into the READMEs.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from chart import draw, write_readmes
from dense_data import recipe, write_data
from provenance import Contender, median, provenance, report

ROUNDS, WARM = 5, 2
BARS = {
    "ratio_dense": 2.0, "ratio_dense_best": 1.7, "ratio_real": 2.5, "ratio_full": 1.5, "fraction_of_gemm_floor": 0.6,
    "memory_ratio_dense": 0.5, "memory_ratio_full": 0.65,
}  # fmt: skip
PEFT = {
    "bf16": {"base": "bfloat16", "adapter": "float32", "autocast": False, "cast": True, "attention": "sdpa"},
    "bf16, eager": {"base": "bfloat16", "adapter": "float32", "autocast": False, "cast": True, "attention": "eager"},
    "bf16, autocast": {"base": "bfloat16", "adapter": "float32", "autocast": True, "cast": True, "attention": "sdpa"},
    "bf16, autocast, no cast": {
        "base": "bfloat16", "adapter": "float32", "autocast": True, "cast": False, "attention": "sdpa",
    },
    "bf16, autocast, no cast, eager": {
        "base": "bfloat16", "adapter": "float32", "autocast": True, "cast": False, "attention": "eager",
    },
    "all bf16": {"base": "bfloat16", "adapter": "bfloat16", "autocast": False, "cast": True, "attention": "sdpa"},
    "all bf16, eager": {
        "base": "bfloat16", "adapter": "bfloat16", "autocast": False, "cast": True, "attention": "eager",
    },
    "fp32, autocast, no cast": {
        "base": "float32", "adapter": "float32", "autocast": True, "cast": False, "attention": "sdpa",
    },
}  # fmt: skip


def search(home: Path) -> tuple[str, dict[str, float]]:
    """Return the name of PEFT's fastest setting on dense batches, and each one's tokens/s (best of two steps)."""
    rates = {}
    for name, options in PEFT.items():
        spec = {"system": "peft", "options": options, "recipe": recipe("dense", home, LORA)}
        contender = Contender(HERE / "contender.py", spec, home)
        turns = [contender.turn() for _ in range(3)]
        contender.close()
        rates[name] = max(turn["tokens"] / turn["seconds"] for turn in turns[1:])
        print(f"  {name:34} {rates[name]:6.0f} tokens/s   {turns[-1]['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return max(rates, key=lambda name: rates[name]), rates


LORA = {"kind": "lora", "rank": 16, "alpha": 32}


def compete(case: str, contenders: dict[str, dict[str, Any]], home: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Let contenders take turns; return seconds, tokens/s and peak memory of each."""
    running = {name: Contender(HERE / "contender.py", spec, home) for name, spec in contenders.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for _ in range(WARM + rounds):
        for name, contender in running.items():
            turns[name].append(contender.turn())
    for contender in running.values():
        contender.close()
    found = {}
    print(f"{case}:")
    for name, all_turns in turns.items():
        rates = [turn["tokens"] / turn["seconds"] for turn in all_turns[WARM:]]
        found[name] = {
            "tokens_per_s": median(rates), "slowest": min(rates), "fastest": max(rates), "samples": rates,
            "peak_bytes": max(turn["peak_bytes"] for turn in all_turns),
        }  # fmt: skip
        print(
            f"  {name:44} {median(rates):6.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f})   "
            f"{found[name]['peak_bytes'] / 1e9:.2f} GB", flush=True,
        )  # fmt: skip
    return found


def gemm_rate() -> float:
    """Return bf16 operations per second of the model's own matrix products, 2048 rows each, weighted by size."""
    import torch

    shapes = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
    seconds = operations = 0.0
    for (out, inner), count in [*((shape, 30 * n) for shape, n in shapes.items()), ((49152, 576), 1)]:
        x, w = torch.randn(2048, inner).bfloat16(), torch.randn(out, inner).bfloat16()
        best = []
        for _ in range(5):
            started = time.perf_counter()
            x @ w.T
            best.append(time.perf_counter() - started)
        seconds += count * median(best)
        operations += count * 2.0 * 2048 * inner * out
    return operations / seconds


def main() -> None:
    """Measure everything and report."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_data(home)
        print("PEFT's settings, dense:", flush=True)
        best, rates = search(home)

        def peft(case: str, name: str) -> dict[str, Any]:
            return {"system": "peft", "options": PEFT[name], "recipe": recipe(case, home, LORA)}

        def haori(case: str, method: dict[str, Any], dtype: str = "bf16") -> dict[str, Any]:
            return {"system": "haori", "recipe": recipe(case, home, method, dtype)}

        names = {"Haori LoRA": None, "PEFT, bf16": "bf16", f"PEFT at its best ({best})": best}
        full = {"kind": "full"}
        rate_before = gemm_rate()
        dense = compete(
            "dense",
            {name: peft("dense", setting) if setting else haori("dense", LORA) for name, setting in names.items()}
            | {"Haori full, bf16": haori("dense", full)},
            home, ROUNDS,
        )  # fmt: skip
        rate = (rate_before + gemm_rate()) / 2
        real = compete(
            "real",
            {name: peft("real", setting) if setting else haori("real", LORA) for name, setting in names.items()},
            home, 2 * ROUNDS,
        )  # fmt: skip
    ours, stock, chosen, whole = dense.values()
    real_ours, real_stock, real_chosen = (of["tokens_per_s"] for of in real.values())
    parameters = 134.5e6
    figures = {
        "ratio_dense": ours["tokens_per_s"] / stock["tokens_per_s"],
        "ratio_dense_best": ours["tokens_per_s"] / chosen["tokens_per_s"],
        "ratio_real": real_ours / real_stock,
        "ratio_real_best": real_ours / real_chosen,
        "ratio_full": ours["tokens_per_s"] / whole["tokens_per_s"],
        "memory_ratio_dense": ours["peak_bytes"] / stock["peak_bytes"],
        "memory_ratio_full": ours["peak_bytes"] / whole["peak_bytes"],
        "fraction_of_gemm_floor": ours["tokens_per_s"] * 4 * parameters / rate,
    }
    for key, value in figures.items():
        bar = BARS.get(key)
        sign = "" if bar is None else (f"<= {bar}" if key.startswith("memory") else f">= {bar}")
        print(f"{key:24} {value:6.2f}  {sign}")
    result = {
        "benchmark": "train_speed", **{key: round(value, 3) for key, value in figures.items()},
        "gemm_gflops": round(rate / 1e9, 1), "peft_best": best, "peft_search": rates, "dense": dense, "real": real,
        "bars": BARS, **provenance(),
    }  # fmt: skip
    if "--write" in sys.argv:
        draw(result)
        write_readmes(result)
    report(result, HERE)


if __name__ == "__main__":
    main()
