"""Adapters for the library's tests: saved by stock PEFT on the tiny base, or hand-written without torch."""

import json
import warnings
from pathlib import Path
from typing import Any

PROBES = [list(range(5, 25)), [7, 9, 11, 30, 31]]


def stock_model(base: Path, config: Any, *, seed: int = 1, scale: float = 0.05) -> Any:
    """Insert a PEFT method with stock PEFT and move every trained value, as training would."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    return model


def save_stock(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def stock_lora(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> Path:
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return save_stock(stock_model(base, LoraConfig(**settings), seed=seed), folder)


def stock_logits(base: Path, folder: Path) -> list[Any]:
    """Load base and adapter with transformers and PEFT alone and run the probes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval())


def run(model: Any) -> list[Any]:
    import torch

    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=int)) for p in PROBES]
    return [output.logits[0, -8:].float() for output in outputs]


def change_tensors(folder: Path, change: Any) -> Path:
    """Rewrite the weight file after `change(tensors)`, in place."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return folder


def written_adapter(folder: Path, *, seed: int = 0, size: int = 4, **config: Any) -> Path:
    """Write a small LoRA folder without torch or PEFT."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {
        key.format("A"): numbers.standard_normal((size, 64), dtype=np.float32),
        key.format("B"): numbers.standard_normal((64, size), dtype=np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": size, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def base_reference(name: str = "tiny", *, weights: str = "w", structure: str = "s", licence: str | None = "MIT") -> Any:
    from haori.core.records import BaseReference, Fingerprint

    fingerprint = Fingerprint(architecture="LlamaForCausalLM", structure=structure, weights=weights)
    return BaseReference(name=name, source=f"folder:/{name}", fingerprint=fingerprint, licence=licence)


def card_of(folder: Path, base: Any = None, **fields: Any) -> Any:
    """Draft a card with a proof that says it passed; the store asks for one and does not repeat it."""
    from haori.core.records import Verification
    from haori.library import draft_card

    fields.setdefault("verification", Verification(passed=True, checks=(), dtype="fp32", time="now"))
    return draft_card(folder, base or base_reference(), origin="trained", **fields)
