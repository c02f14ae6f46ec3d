"""Whole tiny pipelines of each family of image bases: real classes, random weights, saved as diffusers does."""

import string
from pathlib import Path
from typing import Any

LETTERS = string.ascii_lowercase + string.digits + ",.!-"
_BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def clip_tokenizer(pad: str = "<|endoftext|>", length: int = 77) -> Any:
    """Return a CLIPTokenizer of single letters and a few words."""
    from transformers import CLIPTokenizer

    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in merges)]
    vocabulary = {word: at for at, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=length)


def clip_encoder(tokenizer: Any, hidden: int, *, projection: bool = False, seed: int = 0, **settings: Any) -> Any:
    """Return a CLIPTextModel (or with projection, as SDXL has it) that reads what `tokenizer` writes."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=2,
        projection_dim=hidden, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **{"num_hidden_layers": 2, "max_position_embeddings": tokenizer.model_max_length, **settings},
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def kl_autoencoder(seed: int = 1, **settings: Any) -> Any:
    """Return an AutoencoderKL that makes one latent pixel of 4 x 4."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32,
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, **settings,
        }
    ).eval()  # fmt: skip


def unet(context: int, seed: int = 2, **settings: Any) -> Any:
    """Return a UNet2DConditionModel of two levels, the upper with cross-attention."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": context,
    }  # fmt: skip
    return UNet2DConditionModel(**{**sizes, **settings}).eval()


def stable_diffusion(prediction: str = "epsilon", **settings: Any) -> Any:
    """Return a StableDiffusionPipeline; `settings` are of its UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=unet(24, **settings), text_encoder=clip_encoder(tokenizer, 24), tokenizer=tokenizer, vae=kl_autoencoder(),
        scheduler=DDIMScheduler(prediction_type=prediction, **_BETAS), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def saved(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline into a folder and return the folder."""
    pipeline.save_pretrained(folder)
    return folder
