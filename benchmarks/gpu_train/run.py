"""Training on a GPU against PEFT with the Trainer: Llama-shaped models of 1B and 8B parameters with random weights.

Rank 16 on all linear layers, bf16, 4 x 1,024 tokens a step, every token labelled; PEFT with its best attention of
sdpa and, where installed, flash attention; the 8B also over an NF4 base. Contenders run one after the other, each in
a process of its own, because both do not fit a GPU at once; each takes the median of its steps. Bars: at least 1.8
times the tokens/s and at most half the memory. Bases and tokenizer are made on the spot.

Without a GPU it says so and ends, unless `--shapes tiny` asks for a dry run of every line. `--only` picks cases.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPEED = HERE.parent / "train_speed"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "gpu")]
from bases import WORDS, write_base
from provenance import Contender, median, provenance, report

CASES = {"1B-lora": ("1B", "lora"), "8B-lora": ("8B", "lora"), "8B-nf4": ("8B", "qlora")}
BARS = {"ratio": 1.8, "memory_ratio": 0.5}


def recipe(home: Path, base: Path, kind: str, length: int) -> dict[str, Any]:
    """Return the recipe of a case; 4 rows of `length` tokens a step."""
    return {
        "name": "gpu", "base": str(base), "optimizer": {"lr": 1e-4},
        "method": {"kind": kind, "rank": 16, "alpha": 32.0},
        "data": {
            "path": str(home / "rows.jsonl"), "validation_share": 0.0, "max_length": length, "too_long": "truncate",
            "train_on": "all",
        },
        "training": {"epochs": 1, "dtype": "bf16", "batch_tokens": 4 * length, "micro_batch_tokens": 4 * length},
    }  # fmt: skip


def write_rows(home: Path) -> None:
    """Write 96 rows of 1,500 words, which the recipe cuts to length."""
    rows = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(96)]
    (home / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def measure(spec: dict[str, Any], home: Path, warm: int, rounds: int) -> dict[str, Any]:
    """Return tokens/s, with its samples, and peak memory of one contender."""
    contender = Contender(SPEED / "contender.py", spec, home)
    turns = [contender.turn() for _ in range(warm + rounds)]
    contender.close()
    rates = [turn["tokens"] / turn["seconds"] for turn in turns[warm:]]
    return {
        "tokens_per_s": median(rates), "samples": [round(rate, 1) for rate in rates],
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }  # fmt: skip


def case(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one case: ours, then PEFT with each attention that it has here."""
    import torch

    size, kind = CASES[name]
    if kind == "qlora" and find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    shape, length = (size, 1024) if given.shapes == "real" else ("tiny", 64)
    home = given.home
    wanted = recipe(home, write_base(home / shape, shape), kind, length)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what making the base took is the contenders'
    ours = measure({"system": "haori", "recipe": wanted}, home, given.warm, given.rounds)
    theirs = {}
    for attention in ["sdpa", *(["flash_attention_2"] if find_spec("flash_attn") else [])]:
        options = {
            "base": "bfloat16", "adapter": "float32", "autocast": True, "cast": False, "attention": attention,
            "four_bit": kind == "qlora",
        }  # fmt: skip
        theirs[attention] = measure(
            {"system": "peft", "options": options, "recipe": wanted}, home, given.warm, given.rounds
        )
    best = max(theirs.values(), key=lambda found: found["tokens_per_s"])
    return {
        "haori": ours, "peft": theirs, "ratio": ours["tokens_per_s"] / best["tokens_per_s"],
        "memory_ratio": ours["peak_bytes"] / best["peak_bytes"],
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="a case; may be repeated")
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real", help="tiny: a dry run, on the CPU too")
    parser.add_argument("--home", type=Path, help="folder for bases and rows; one in memory saves time")
    parser.add_argument("--warm", type=int, default=3, help="steps that do not count")
    parser.add_argument("--rounds", type=int, default=10, help="steps that count")
    parser.add_argument("--write", action="store_true", help="keep the result")
    return parser.parse_args()


def main() -> None:
    """Measure each case and report."""
    import torch

    given = arguments()
    if not torch.cuda.is_available() and given.shapes == "real":
        print("There is no GPU here; nothing was measured.")
        print(json.dumps({"benchmark": "gpu_train", "skipped": "no GPU"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        given.home = given.home or Path(folder)
        given.home.mkdir(parents=True, exist_ok=True)
        os.environ["HAORI_HOME"] = str(given.home)
        write_rows(given.home)
        cases: dict[str, Any] = {}
        for name in given.only or CASES:
            cases[name] = found = case(name, given)
            if "ratio" in found:
                print(
                    f"{name:8} {found['ratio']:.2f} x tokens/s (>= {BARS['ratio']}), "
                    f"{found['memory_ratio']:.2f} of the memory (<= {BARS['memory_ratio']})",
                    flush=True,
                )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report({"benchmark": "gpu_train", "gpu": gpu, "shapes": given.shapes, "cases": cases, "bars": BARS,
            **provenance()}, HERE)  # fmt: skip


if __name__ == "__main__":
    main()
