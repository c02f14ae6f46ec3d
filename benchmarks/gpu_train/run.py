"""Training on a GPU against PEFT with the Trainer: Llama-shaped models of 1B and 8B parameters with random weights.

Rank 16 on all linear layers, bf16, 4 x 1,024 tokens a step, every token labelled; PEFT with its best attention of
sdpa and, where installed, flash attention; the 8B also over an NF4 base. Contenders run one after the other, each in
a process of its own, because both do not fit a GPU at once; each takes the median of its steps. Bars: at least 1.8
times the tokens/s and at most half the memory. Without a GPU it says so and ends.
"""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SPEED = HERE.parent / "train_speed"
sys.path[:0] = [str(HERE.parent)]
from provenance import Contender, median, provenance, report

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ROUNDS, WARM = 10, 3
BARS = {"ratio": 1.8, "memory_ratio": 0.5}


def write_model(home: Path, size: str) -> Path:
    """Write a Llama of the given size with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from haori.bases import find_base, load_tokenizer

    folder = home / size
    tokenizer = load_tokenizer(find_base("smollm2-135m-instruct"))
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=8, max_position_embeddings=8192, **SHAPES[size])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(home: Path, model: Path, method: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a case."""
    return {
        "name": "gpu", "base": str(model), "optimizer": {"lr": 1e-4}, "method": method,
        "data": {
            "path": str(home / "rows.jsonl"), "validation_share": 0.0, "max_length": 1024, "too_long": "truncate",
            "train_on": "all",
        },
        "training": {"epochs": 1, "dtype": "bf16", "batch_tokens": 4096, "micro_batch_tokens": 4096},
    }  # fmt: skip


def measure(spec: dict[str, Any], home: Path) -> dict[str, float]:
    """Return tokens/s and peak memory of one contender."""
    contender = Contender(SPEED / "contender.py", spec, home)
    turns = [contender.turn() for _ in range(WARM + ROUNDS)]
    contender.close()
    rates = [turn["tokens"] / turn["seconds"] for turn in turns[WARM:]]
    return {"tokens_per_s": median(rates), "peak_bytes": max(turn["peak_bytes"] for turn in turns)}


def main() -> None:
    """Measure each size and report."""
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU here; nothing was measured.")
        print(json.dumps({"benchmark": "gpu_train", "skipped": "no GPU"}))
        return
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["HAORI_HOME"] = str(home)
        words = [f"word{n}" for n in range(1500)]
        rows = [" ".join(words[n:] + words[:n]) for n in range(96)]
        (home / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        attentions = ["sdpa", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
        for size, kind in (("1B", "lora"), ("8B", "lora"), ("8B", "qlora")):
            model = write_model(home, size) if not (home / size).exists() else home / size
            wanted = recipe(home, model, {"kind": kind, "rank": 16, "alpha": 32.0})
            ours = measure({"system": "haori", "recipe": wanted}, home)
            theirs = {}
            for attention in attentions:
                options = {
                    "base": "bfloat16", "adapter": "float32", "autocast": True, "cast": False, "attention": attention,
                    "four_bit": kind == "qlora",
                }  # fmt: skip
                theirs[attention] = measure({"system": "peft", "options": options, "recipe": wanted}, home)
            best = max(theirs.values(), key=lambda found: found["tokens_per_s"])
            ratio = ours["tokens_per_s"] / best["tokens_per_s"]
            memory = ours["peak_bytes"] / best["peak_bytes"]
            print(f"{size} {kind:6} {ratio:.2f} x tokens/s (>= 1.8), {memory:.2f} of the memory (<= 0.5)", flush=True)
            cases[f"{size} {kind}"] = {"haori": ours, "peft": theirs, "ratio": ratio, "memory_ratio": memory}
    report({"benchmark": "gpu_train", "gpu": torch.cuda.get_device_name(), "cases": cases, "bars": BARS,
            **provenance()}, HERE)  # fmt: skip


if __name__ == "__main__":
    main()
