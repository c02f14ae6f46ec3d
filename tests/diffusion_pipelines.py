"""Whole tiny pipelines of each family of image bases: real classes, random weights, saved as diffusers does."""

import string
from collections.abc import Callable
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


def stable_diffusion_xl() -> Any:
    """Return a StableDiffusionXLPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    first, second = clip_tokenizer(), clip_tokenizer(pad="!</w>")
    encoder = clip_encoder(second, 12, projection=True, seed=3)
    return StableDiffusionXLPipeline(
        unet=unet(
            20, addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        ),
        text_encoder=clip_encoder(first, 8), text_encoder_2=encoder, tokenizer=first, tokenizer_2=second,
        vae=kl_autoencoder(), add_watermarker=False,
        scheduler=DDIMScheduler(**_BETAS),
    )  # fmt: skip


def flow_scheduler(shift: float = 3.0, **settings: Any) -> Any:
    """Return the scheduler of the transformers' pipelines."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, **settings)


def t5_tokenizer() -> Any:
    """Return a T5Tokenizer of single letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    return T5Tokenizer([(piece, -float(at)) for at, piece in enumerate(pieces)], extra_ids=0, model_max_length=512)


def flux1(*, guided: bool = True) -> Any:
    """Return a FluxPipeline, of dev or of schnell."""
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    reader = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=24, d_kv=12, d_ff=40, num_layers=2, num_heads=2, dropout_rate=0.0)
    )
    return FluxPipeline(
        transformer=transformer.eval(), text_encoder=clip_encoder(clip, 20), text_encoder_2=reader.eval(),
        tokenizer=clip, tokenizer_2=t5, vae=kl_autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=flow_scheduler(use_dynamic_shifting=guided),
    )  # fmt: skip


def qwen_tokenizer() -> Any:
    """Return a Qwen2Tokenizer of single bytes with a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {letter: at for at, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocabulary, [], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    return tokenizer


def qwen3(tokenizer: Any, layers: int) -> Any:
    """Return a Qwen3ForCausalLM of hidden size 16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def flux2_klein() -> Any:
    """Return a Flux2KleinPipeline; its batch norm has statistics that are not 0 and 1."""
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    tokenizer = qwen_tokenizer()
    torch.manual_seed(6)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, axes_dims_rope=(4, 4, 4, 4), attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        transformer=transformer.eval(), text_encoder=qwen3(tokenizer, 28), tokenizer=tokenizer, vae=vae.eval(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def z_image() -> Any:
    """Return a ZImagePipeline."""
    import torch
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    torch.manual_seed(7)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        siglip_feat_dim=None, axes_dims=[4, 6, 6], axes_lens=[640, 32, 32],
    )  # fmt: skip
    for weight in transformer.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return ZImagePipeline(
        transformer=transformer.eval(), text_encoder=qwen3(tokenizer, 3), tokenizer=tokenizer,
        vae=kl_autoencoder(shift_factor=0.1159, scaling_factor=0.3611), scheduler=flow_scheduler(),
    )  # fmt: skip


def qwen_image() -> Any:
    """Return a QwenImagePipeline."""
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    torch.manual_seed(8)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight))
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, axes_dims_rope=(4, 4, 8), attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[1.1, 0.9, 1.3, 0.7],
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer.eval(), text_encoder=encoder.eval(), tokenizer=tokenizer, vae=vae.eval(),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "flux1": flux1,
    "flux2": flux2_klein,
    "z_image": z_image,
    "qwen_image": qwen_image,
}
"""A pipeline of each family."""


def saved(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline into a folder and return the folder."""
    pipeline.save_pretrained(folder)
    return folder
