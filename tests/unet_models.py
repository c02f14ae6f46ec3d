"""Tiny real pipelines of the shape of Stable Diffusion 1.5 and XL, and adapters that change their modules."""

from collections.abc import Callable, Iterator
from typing import Any

from haori.library.updates import AdapterUpdates, ModuleUpdate

_SD15 = {"block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 12, "attention_head_dim": 2}
_SDXL = {
    "block_out_channels": (8, 16, 16), "cross_attention_dim": 20, "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def unet(family: str) -> Any:
    """Return a UNet2DConditionModel of the family's shape."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = _SDXL if family == "sdxl" else _SD15
    return UNet2DConditionModel(sample_size=8, norm_num_groups=4, **sizes).eval()


def text_encoder(hidden: int, *, projection: bool = False) -> Any:
    """Return a CLIPTextModel, or CLIPTextModelWithProjection as SDXL has it."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=hidden, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def pipeline(family: str) -> Any:
    """Return a stock pipeline of the family, as far as loading of adapters goes: without VAE and tokenizers."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    rest: dict[str, Any] = {
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    if family == "sd15":
        return StableDiffusionPipeline(
            unet=unet(family), text_encoder=text_encoder(12), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, **rest,
        )  # fmt: skip
    return StableDiffusionXLPipeline(
        unet=unet(family), text_encoder=text_encoder(8), text_encoder_2=text_encoder(12, projection=True),
        tokenizer_2=None, add_watermarker=False, **rest,
    )  # fmt: skip


def layers(pipe: Any, kinds: tuple[str, ...] = ("Linear", "Conv2d")) -> Iterator[tuple[str, Any]]:
    """Yield the layers of all components by their neutral names."""
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for path, layer in model.named_modules() if model is not None else ():
            if type(layer).__name__ in kinds:
                clip = component != "unet" and path.startswith(("encoder.", "embeddings.", "final_layer_norm"))
                yield f"{component}.{'text_model.' if clip else ''}{path}", layer


def lora_for(layer: Any, rank: int, seed: int, alpha: float | None = None) -> ModuleUpdate:
    """Return a random LoRA for a linear layer or a convolution."""
    import torch

    numbers = torch.Generator().manual_seed(seed)
    shape = tuple(layer.weight.shape)
    a = torch.randn(rank, *shape[1:], generator=numbers)
    b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=numbers)
    return ModuleUpdate("lora", {"A": a, "B": b}, alpha=alpha)


def adapter(pipe: Any, family: str, fits: Callable[[str], bool] = lambda _name: True) -> AdapterUpdates:
    """Return a LoRA of every layer, its ranks and alphas varying from layer to layer."""
    modules = {
        name: lora_for(layer, (4, 4, 2)[at % 3], at, (None, 1.0, 3.0, 4.0)[at % 4])
        for at, (name, layer) in enumerate(layers(pipe))
        if fits(name)
    }
    return AdapterUpdates(modules, family=family)
