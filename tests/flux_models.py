"""Tiny real models of the shape of Flux.1: a transformer, and a pipeline of it with its text encoders."""

import json
from pathlib import Path
from typing import Any

HIDDEN = 32
HEADS, HEAD_SIZE = 2, 16


def flux_transformer(seed: int = 0, **settings: Any) -> Any:
    """Return a FluxTransformer2DModel with two double and two single blocks, hidden size 32, context 24."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": HEAD_SIZE,
        "num_attention_heads": HEADS, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return FluxTransformer2DModel(**{**sizes, **settings})


def write_flux_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write a Flux pipeline's transformer, CLIP and T5 text encoders, each by its own save_pretrained."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    flux_transformer(seed).save_pretrained(folder / "transformer")
    torch.manual_seed(seed)
    clip = CLIPTextConfig(
        vocab_size=99, hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    t5 = T5Config(
        vocab_size=99, d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    parts = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.35.1",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(parts))
    return folder


def image_transformers() -> dict[str, Any]:
    """Return a tiny transformer of each family, with two blocks of each kind."""
    import torch
    from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel

    torch.manual_seed(0)
    heads: dict[str, Any] = {"attention_head_dim": HEAD_SIZE, "num_attention_heads": HEADS, "joint_attention_dim": 24}
    return {
        "flux1": flux_transformer(),
        "flux2": Flux2Transformer2DModel(
            in_channels=4, num_layers=2, num_single_layers=2, axes_dims_rope=(4, 4, 4, 4), **heads
        ),
        "qwen_image": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, axes_dims_rope=(4, 4, 8), **heads
        ),
        "z_image": ZImageTransformer2DModel(
            in_channels=4, dim=HIDDEN, n_layers=2, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=24,
            siglip_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[32, 32, 32],
        ),
    }  # fmt: skip
