"""The factors that a fresh adapter begins with: those of stock PEFT for the same seed."""

import secrets
from typing import TYPE_CHECKING, Any

import torch

from haori.bases.quiet import quiet_transformers
from haori.jobs.tenants.records import AdapterSpec
from haori.jobs.tenants.tenant import LoraPair

if TYPE_CHECKING:
    from haori.jobs.tenants.shared_model import SharedModel

__all__ = ["fresh_factors"]


def fresh_factors(shared: "SharedModel", spec: AdapterSpec) -> dict[str, LoraPair]:
    """Return Kaiming-uniform A and zero B of every module that `spec` adapts.

    PEFT itself draws them, in the order in which it walks through the model, and is taken out again.

    Raises:
        InputError: The adapter would train nothing, or a module that cannot be trained.
    """
    from peft import LoraConfig, get_peft_model

    names = shared.targets(spec)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=names, bias="none")
    seed = secrets.randbits(63) if spec.seed is None else spec.seed
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(shared.model, config)
    found = {}
    try:
        for name, layer in wrapped.get_base_model().named_modules():
            if name in names:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                found[name] = LoraPair(a, b, float(layer.scaling["default"]))
    finally:
        wrapped.unload()
        shared.model.requires_grad_(False)
    return found
