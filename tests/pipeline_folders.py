"""Folders of diffusers pipelines, as diffusers writes them, with tiny components."""

import json
import shutil
from pathlib import Path
from typing import Any

TEXT_ENCODER = "CLIPTextModel"
UNET = "UNet2DConditionModel"


def write_part(folder: Path, name: str, architecture: str, seed: int = 0, *, file: str | None = None) -> None:
    """Write a component of diffusers: two convolutions."""
    import numpy as np
    from safetensors.numpy import save_file

    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps({"_class_name": architecture, "_diffusers_version": "0.35.1"}))
    numbers = np.random.default_rng(seed)
    tensors = {f"conv_{at}.weight": numbers.standard_normal((4, 4, 3, 3), dtype=np.float32) for at in ("in", "out")}
    save_file(tensors, place / (file or "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})


def write_pipeline(folder: Path, tokenizer: Path, *, unet: int = 0, vae: int = 1, **index: Any) -> Path:
    """Write a pipeline of Stable Diffusion's parts: unet, vae, a real text encoder, tokenizer and scheduler.

    Args:
        folder: Where to; made anew.
        tokenizer: Folder whose tokenizer it gets.
        unet: Seed of the unet's weights.
        vae: Seed of those of the vae.
        index: Entries of model_index.json besides.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    shutil.rmtree(folder, ignore_errors=True)
    write_part(folder, "unet", UNET, unet)
    write_part(folder, "vae", "AutoencoderKL", vae)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=400, projection_dim=16, **size)).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / "tokenizer" / file)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    parts: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", TEXT_ENCODER],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", UNET],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps({**parts, **index}))
    return folder
