"""The parts of emoji-sd, of Stable Diffusion's shape and stock classes."""

from typing import Any

import torch
from captions import MAX_TOKENS
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from latents import CHANNELS, PATCH
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from pictures import SIZE

__all__ = ["autoencoder", "denoiser", "plain_attention", "scheduler", "text_encoder"]

TEXT_WIDTH = 192


def denoiser(**also: Any) -> UNet2DConditionModel:
    """A UNet of 13M parameters with cross-attention at 16 x 16 and 8 x 8."""
    shape = {
        "sample_size": SIZE // PATCH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": (64, 128, 256),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": (2, 4, 4),  # heads, for all its name
        "norm_num_groups": 16,
        "resnet_time_scale_shift": "scale_shift",
    }
    return UNet2DConditionModel(**{**shape, **also})


def plain_attention(unet: UNet2DConditionModel) -> None:
    """Let attention be a product and a softmax: with heads this small, twice as fast on a CPU as the fused kernel."""
    unet.set_attn_processor(AttnProcessor())


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """Two layers of CLIP's text encoder, over the words of the captions."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    model = CLIPTextModel(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)  # 0.02 is slow to leave for so few words
    return model


def autoencoder() -> AutoencoderKL:
    """A small autoencoder, f4 with 8 channels; its latents are the code as it is, so its scaling factor is 1."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def scheduler() -> DDIMScheduler:
    """Cosine noise and v-prediction."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # has no effect at this spacing; what Stable Diffusion has
    )
