"""Adapters of tiny pipelines as training leaves them: PEFT folders over the model of the whole pipeline."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNET = r"unet\..*\.(to_[qkv]|to_out\.0|proj_in|ff\.net\.2)"
TEXT = r"text_encoder(_2)?\..*\.(q_proj|v_proj|out_proj|fc1)"
CONVOLUTIONS = r"unet\..*\.(conv1|conv2|conv_shortcut|downsamplers\.0\.conv)"


def adapted(base: Any, targets: str, *, config: Any = None, seed: int = 1, size: float = 0.1, **options: Any) -> Any:
    """Return the pipeline's model with an adapter whose values were moved, as training would.

    Args:
        base: A base with a pipeline.
        targets: Regular expression of the adapted modules.
        config: PEFT's configuration class; LoRA by default.
        seed: Of the values.
        size: Their spread.
        options: Of the configuration.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from haori.bases import load_model

    options = {"r": 4, "lora_alpha": 6, **options} if config is None else options
    settings = (config or LoraConfig)(target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_model(base, dtype="fp32", device="cpu"), settings).eval()
    numbers = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += size * torch.randn(parameter.shape, generator=numbers)
        elif parameter.requires_grad:
            parameter.data *= 1 + size * torch.rand(parameter.shape, generator=numbers)
    return model


def saved_adapter(model: Any, folder: Path, base_name: str = "tiny") -> Path:
    """Write an adapter as the end of training does."""
    from haori.training.checkpoint import save_adapter

    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, folder, base_name)
    return folder


def drawn(pipe: Any, size: int = 32, **options: Any) -> Any:
    """Return the latents that a stock pipeline draws for a prompt in three steps, by a fixed seed."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a red cat", num_inference_steps=3, guidance_scale=2.0, output_type="latent", height=size, width=size,
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


def changed_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Rewrite an adapter's weights after `change`, in place."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder
