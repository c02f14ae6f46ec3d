"""What is trained on: pipelines of random weights, and pictures with captions.

`sd15` has the shape of Stable Diffusion 1.5 at less than half its width: a UNet of 142M parameters, 256 x 256 pixels.
`emoji` stands in for emoji-sd where that is not at hand, of the same shape.
"""

import string
from pathlib import Path
from typing import Any

__all__ = ["PIXELS", "base_of", "write_pictures"]

PIXELS = {"emoji": 64, "sd15": 256}
_LETTERS = string.ascii_lowercase + string.digits
_WORDS = ("cat", "red", "sun", "pin", "map")


def base_of(case: str, home: Path) -> tuple[str, bool]:
    """Return what `base` of a recipe says, and whether its weights are trained ones."""
    from haori.bases import find_base
    from haori.core.errors import HaoriError

    if case == "emoji":
        try:
            return str(find_base("emoji-sd").path), True
        except HaoriError:
            pass
    folder = home / f"{case}-base"
    if not folder.exists():
        _pipeline(case).save_pretrained(folder)
    return str(folder), False


def write_pictures(folder: Path, size: int, count: int = 40) -> Path:
    """Write pictures of bars and spots, each with a caption beside it."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    for at in range(count):
        cells = numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{at:03}.png")
        words = numbers.choice(_WORDS, 3, replace=True)
        (folder / f"{at:03}.txt").write_text(f"{' '.join(words)} {at}")
    return folder


def _pipeline(case: str) -> Any:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    pieces = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    length = 77 if case == "sd15" else 16
    tokenizer = CLIPTokenizer(
        {piece: at for at, piece in enumerate(pieces)}, [], pad_token="<|endoftext|>", model_max_length=length
    )
    width = 768 if case == "sd15" else 192
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=(4 if case == "sd15" else 2) * width,
        num_hidden_layers=12 if case == "sd15" else 2, num_attention_heads=12 if case == "sd15" else 4,
        projection_dim=width, max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if case == "sd15":
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, sample_size=256,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=32, block_out_channels=(128, 256, 512, 512), cross_attention_dim=768, attention_head_dim=8
        )
    else:
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            mid_block_add_attention=False,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=8, out_channels=8, block_out_channels=(64, 128, 256), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=192,
            attention_head_dim=(2, 4, 4), norm_num_groups=16, resnet_time_scale_shift="scale_shift",
        )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
