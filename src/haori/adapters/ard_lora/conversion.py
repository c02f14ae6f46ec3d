"""ARD-LoRA to plain LoRA, without loss: B' = B * G (or A' = A * G), alpha per module so that the scale stays.

What comes out is for stock PEFT and everything that reads it; it needs nothing of this project.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import FileFormatError, InputError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor

    from haori.adapters.ard_lora.config import ArdLoraConfig

__all__ = ["to_lora"]

_PREFIX = "base_model.model."


def to_lora(source: "Path | PeftModel", adapter: str = "default") -> "tuple[LoraConfig, dict[str, Tensor]]":
    """Return an equal plain LoRA: its configuration and the tensors of its file.

    A module of rank R gets alpha R / r0, which gives it the scale alpha / r0 of all others. Gates that are not whole
    are multiplied in, so this is exact before pruning too.

    Args:
        source: A folder as `save_pretrained` writes it, or a model with the adapter on it.
        adapter: Name of the adapter on that model.

    Raises:
        FileFormatError: The folder's files are not there or cannot be read.
        InputError: It is an adapter of another method.
    """
    config, tensors = _read(source) if isinstance(source, Path) else _of_model(source, adapter)
    plain: dict[str, Tensor] = {key: value for key, value in tensors.items() if not key.endswith(".ard_rho")}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            plain |= _module(key.removesuffix(".lora_A.weight"), tensors, config.r)
    ranks = {
        key.removesuffix(".lora_A.weight").removeprefix(_PREFIX): value.shape[0]
        for key, value in plain.items()
        if key.endswith(".lora_A.weight")
    }
    return _config(config, ranks), plain


def _module(name: str, tensors: "dict[str, Tensor]", start: int) -> "dict[str, Tensor]":
    """Return the two factors of a module with its gates multiplied in, cut to what is open."""
    from haori.adapters.ard_lora.gates import open_ranks
    from haori.adapters.ard_lora.heads import HeadLayout, side_of
    from haori.adapters.ard_lora.layer import gated

    first, second = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    a, b, rho = tensors[first], tensors[second], tensors.get(f"{name}.ard_rho")
    if rho is not None:
        a, b = gated(a, b, rho, start, HeadLayout(rho.numel(), side_of(name)))
        width = max(open_ranks(rho, start))
        a, b = a[:width], b[:, :width]
    return {first: a.contiguous(), second: b.contiguous()}


def _config(config: "ArdLoraConfig", ranks: dict[str, int]) -> "LoraConfig":
    from peft import LoraConfig

    other = {name: rank for name, rank in sorted(ranks.items()) if rank != config.r}
    targets = config.target_modules
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        rank_pattern=other,
        alpha_pattern={name: config.lora_alpha * rank / config.r for name, rank in other.items()},
        target_modules=targets if isinstance(targets, str) else sorted(targets or ranks),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,  # says what class of model the names are of
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _read(folder: Path) -> "tuple[ArdLoraConfig, dict[str, Tensor]]":
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise FileFormatError(f"{str(folder)!r} holds no readable adapter: {str(error).splitlines()[0]}") from None
    return _checked(config), tensors


def _of_model(model: "PeftModel", adapter: str) -> "tuple[ArdLoraConfig, dict[str, Tensor]]":
    from peft import get_peft_model_state_dict

    config = _checked(model.peft_config[adapter])
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return config, {key: value.detach() for key, value in tensors.items()}


def _checked(config: object) -> "ArdLoraConfig":
    from haori.adapters.ard_lora.config import ArdLoraConfig

    if not isinstance(config, ArdLoraConfig):
        kind = getattr(getattr(config, "peft_type", None), "value", type(config).__name__)
        raise InputError(f"The adapter is a {kind}, and only ARD_LORA can be turned into a plain LoRA here.")
    return config
