"""The LoRA adapters of all seeds as one, at half the strength of their mean: what they agree on is the task.

Blending is (sum_i w_i s B_i A_i), which one adapter of the ranks' sum computes: its A are those of all, one below the
other, and its B those of all, side by side, each times its share.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["blended"]

STRENGTH = 0.5


def blended(task: str, test: Path, home: Path, score: str, seeds: int) -> dict[str, Any]:
    """Return the blend's score and what it forgot; what was measured before is read again."""
    folder = home / f"comparison-{task}"
    os.environ.update(HAORI_HOME=str(home), HAORI_WORKSPACE=str(folder / "workspace"))
    kept = folder / "blend.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_measure(task, test, folder, score, seeds)))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _measure(task: str, test: Path, folder: Path, score: str, seeds: int) -> dict[str, Any]:
    from haori.core.settings import settings
    from haori.evaluation import forgetting_between
    from haori.library import open_adapter
    from haori.tasks.causal_lm.forgetting_texts import general_texts, text_losses

    settings.cache_clear()
    name = f"{task}-blend"
    _write(task, folder / "blend", seeds)
    haori = Path(sys.executable).with_name("haori")
    base = ["--base", "smollm2-135m-instruct"]
    subprocess.run([haori, "library", "add", folder / "blend", *base, "--name", name], check=True)
    out = folder / "blend-evaluation"
    options = ["--data", test, "--samples", "0", "--against", "nothing", "--out", out]
    subprocess.run([haori, "evaluate", name, *options], check=True)
    evaluation = json.loads((out / "evaluation.json").read_text())
    opened = open_adapter(name)
    losses = []
    for worn in (False, True):
        with opened.strength(worn):
            losses.append(text_losses(opened.model, opened.tokenizer, general_texts()))
    forgotten = forgetting_between(*losses).whole
    return {
        "strength": STRENGTH, "score": evaluation["metrics"][score],
        "forgetting": {"difference": forgotten.difference, "low": forgotten.low, "high": forgotten.high},
    }  # fmt: skip


def _write(task: str, folder: Path, seeds: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from haori.library import Library

    library = Library()
    folders = [library.folder(library.get(f"{task}-lora-seed-{seed}").card.id) for seed in range(seeds)]
    adapters = [load_file(one / "adapter_model.safetensors") for one in folders]
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    whole = {}
    for key in adapters[0]:
        if "lora_A" in key:
            whole[key] = torch.cat([one[key] for one in adapters])
        else:
            whole[key] = torch.cat([one[key] * (STRENGTH / seeds) for one in adapters], 1)
    config |= {"r": seeds * config["r"], "lora_alpha": seeds * config["lora_alpha"]}
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in whole.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
