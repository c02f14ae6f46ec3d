"""Training speed and memory of picture LoRA: Haori against the logic of diffusers' example, and full fine-tuning.

    emoji   emoji-sd (or random weights of its shape where it is not at hand), 64 x 64 pixels, 16 pictures a step
    sd15    random weights of the shape of Stable Diffusion 1.5 at half its width, 256 x 256 pixels, 4 pictures a step

LoRA of rank 8 on the attention's four projections, as the example has it. Each contender is a process of its own (so
that its peak memory is its own); they take turns, step by step. First a search finds the example's best setting. The
example encodes pictures and captions in each step; `cached` gives it both ready, which it cannot do itself.

    python benchmarks/images_train/run.py [--write] [--smoke] [--style FOLDER]

Prints tables and, as its last line, one JSON object; `--write` keeps it. `--smoke` takes two steps of each, which says
that everything runs and nothing else. `--style` measures `style_fit` as well (style.py says what FOLDER holds).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from bases import PIXELS, base_of, write_pictures
from provenance import Contender, median, provenance, report

SMOKE = "--smoke" in sys.argv
ROUNDS, WARM = (1, 1) if SMOKE else (7, 2)
BATCH = {"emoji": 16, "sd15": 4}
BARS = {"step_ratio": 1.5, "memory_ratio": 0.6, "lora_vs_full_step": 1.3}
EXAMPLE: dict[str, dict[str, bool]] = {
    "fp32": {"bf16": False, "sdpa": True, "channels_last": False},
    "bf16": {"bf16": True, "sdpa": True, "channels_last": False},
    "bf16, channels last": {"bf16": True, "sdpa": True, "channels_last": True},
    "fp32, plain attention": {"bf16": False, "sdpa": False, "channels_last": False},
    "bf16, plain attention": {"bf16": True, "sdpa": False, "channels_last": False},
    "bf16, plain attention, channels last": {"bf16": True, "sdpa": False, "channels_last": True},
}


def search(common: dict[str, Any], home: Path) -> tuple[str, dict[str, float]]:
    """Return the name of the example's fastest setting, and each one's pictures/s (best of two steps)."""
    rates = {}
    for name, options in EXAMPLE.items():
        contender = Contender(HERE / "contender.py", example(common, options), home)
        turns = [contender.turn() for _ in range(2 if SMOKE else 3)]
        contender.close()
        rates[name] = max(turn["pictures"] / turn["seconds"] for turn in turns[1:])
        print(f"  {name:38} {rates[name]:6.1f} pictures/s   {turns[-1]['peak_bytes'] / 1e9:.2f} GB", flush=True)
    return max(rates, key=lambda name: rates[name]), rates


def example(common: dict[str, Any], options: dict[str, bool], *, cached: bool = False) -> dict[str, Any]:
    """Return what a contender of the example is told."""
    import torch

    cpu = not torch.cuda.is_available()  # as Haori chooses
    return {"system": "diffusers", "cpu": cpu, "options": {**options, "cached": cached}, **common}


def compete(contenders: dict[str, dict[str, Any]], home: Path) -> dict[str, dict[str, Any]]:
    """Let contenders take turns; return seconds, pictures/s and peak memory of each."""
    running = {name: Contender(HERE / "contender.py", spec, home) for name, spec in contenders.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for _ in range(WARM + ROUNDS):
        for name, contender in running.items():
            turns[name].append(contender.turn())
    for contender in running.values():
        contender.close()
    found = {}
    for name, all_turns in turns.items():
        rates = [turn["pictures"] / turn["seconds"] for turn in all_turns[WARM:]]
        found[name] = {
            "pictures_per_s": median(rates), "slowest": min(rates), "fastest": max(rates), "samples": rates,
            "peak_bytes": max(turn["peak_bytes"] for turn in all_turns),
        }  # fmt: skip
        print(
            f"  {name:54} {median(rates):6.1f} pictures/s ({min(rates):.1f} to {max(rates):.1f})   "
            f"{found[name]['peak_bytes'] / 1e9:.2f} GB", flush=True,
        )  # fmt: skip
    return found


def measure(case: str, home: Path) -> dict[str, Any]:
    """Search and compete on one base; return its figures."""
    base, trained = base_of(case, home)
    data = write_pictures(home / f"{case}-pictures", PIXELS[case])
    common = {"base": base, "data": str(data), "size": PIXELS[case], "batch": BATCH[case]}
    print(f"{case}{'' if trained else ' (random weights)'}; the example's settings:", flush=True)
    best, rates = search(common, home)
    options = EXAMPLE[best]
    found = compete(
        {
            "Haori LoRA": {"system": "haori", "method": "lora", **common},
            f"example at its best ({best})": example(common, options),
            "the same with everything encoded before": example(common, options, cached=True),
            "Haori, every weight": {"system": "haori", "method": "full", **common},
        },
        home,
    )
    ours, peer, cached, full = found.values()
    return {
        "base_is_trained": trained,
        "step_ratio": ours["pictures_per_s"] / peer["pictures_per_s"],
        "step_ratio_cached": ours["pictures_per_s"] / cached["pictures_per_s"],
        "memory_ratio": ours["peak_bytes"] / peer["peak_bytes"],
        "memory_ratio_cached": ours["peak_bytes"] / cached["peak_bytes"],
        "lora_vs_full_step": ours["pictures_per_s"] / full["pictures_per_s"],
        "best": best, "search": rates, "contenders": found,
    }  # fmt: skip


def main() -> None:
    """Measure everything and report."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: measure(case, Path(folder)) for case in PIXELS}
    for case, found in cases.items():
        for key in ("step_ratio", "step_ratio_cached", "memory_ratio", "memory_ratio_cached", "lora_vs_full_step"):
            bar = BARS.get(key)
            sign = "" if bar is None else f"<= {bar}" if key.startswith("memory") else f">= {bar}"
            print(f"{case:6} {key:20} {found[key]:6.2f}  {sign}")
    result: dict[str, Any] = {"benchmark": "images_train", "batch": BATCH, "bars": BARS, **cases}
    if "--style" in sys.argv:
        from style import measure_style

        result["style"] = measure_style(Path(sys.argv[sys.argv.index("--style") + 1]))
    report({**result, **provenance()}, HERE)


if __name__ == "__main__":
    main()
