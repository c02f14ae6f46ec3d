"""What each method costs beside plain LoRA: time of a step and peak memory, on the dense batches of train_speed.

Each method is a process of its own; they take turns, step by step. Besides: the memory of SmolLM2's linear weights in
NF4 with double quantisation, relative to bf16. Prints a table and, as its last line, one JSON object.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
from dense_data import recipe, write_data
from provenance import Contender, median, provenance, report

ROUNDS, WARM = 6, 3
BARS = {"dora": 1.25, "ard_lora": 1.15, "adalora": 1.3, "nf4_memory": 0.35}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 16, "alpha": 32},
    "dora": {"kind": "dora", "rank": 16, "alpha": 32},
    "ard_lora": {"kind": "ard_lora", "rank": 16, "alpha": 32},
    "adalora": {"kind": "adalora", "rank": 16, "initial_rank": 24, "alpha": 32},
    "qlora": {"kind": "qlora", "rank": 16, "alpha": 32},
}


def nf4_share(home: Path) -> float:
    """Return the bytes of linear weights in NF4 relative to bf16, by loading both."""
    os.environ["HAORI_HOME"] = str(home)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from haori.bases import find_base

    def size(model: Any) -> int:
        total = 0
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                weight = module.weight
                total += weight.numel() * weight.element_size()
                state = getattr(weight, "quant_state", None)
                if state is not None:
                    total += sum(v.numel() * v.element_size() for v in state.as_dict(packed=True).values())
        return total

    path = find_base("smollm2-135m-instruct").path
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    four = size(AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, dtype=torch.bfloat16))
    return four / size(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))


def main() -> None:
    """Let the methods take turns, and report."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_data(home)
        running = {
            name: Contender(
                HERE.parent / "train_speed" / "contender.py",
                {"system": "haori", "recipe": recipe("dense", home, method)},
                home,
            )
            for name, method in METHODS.items()
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(WARM + ROUNDS):
            for name, contender in running.items():
                turns[name].append(contender.turn())
        for contender in running.values():
            contender.close()
        memory = nf4_share(home)
    found = {}
    plain = [turn["seconds"] / turn["tokens"] for turn in turns["lora"][WARM:]]
    for name, all_turns in turns.items():
        costs = [turn["seconds"] / turn["tokens"] for turn in all_turns[WARM:]]
        ratios = [cost / base for cost, base in zip(costs, plain, strict=True)]
        found[name] = {
            "relative_time": round(median(ratios), 3), "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3), "tokens_per_s": round(1 / median(costs), 1),
            "peak_bytes": max(turn["peak_bytes"] for turn in all_turns), "samples": costs,
        }  # fmt: skip
        bar = f"<= {BARS[name]}" if name in BARS else ""
        print(
            f"{name:10} {median(ratios):.2f} x LoRA ({min(ratios):.2f} to {max(ratios):.2f})  "
            f"{1 / median(costs):5.0f} tokens/s  {found[name]['peak_bytes'] / 1e9:.2f} GB  {bar}"
        )
    print(f"NF4 linear weights: {memory:.3f} of bf16  <= {BARS['nf4_memory']}")
    report(
        {"benchmark": "methods", "methods": found, "nf4_memory": round(memory, 4), "bars": BARS, **provenance()}, HERE
    )


if __name__ == "__main__":
    main()
