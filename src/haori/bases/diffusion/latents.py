"""Pictures to latents and back through a KL autoencoder (Rombach et al. 2022, arXiv 2112.10752).

The denoiser sees z = (x - shift) * scale, with both numbers in the autoencoder's configuration; Stable Diffusion has
no shift.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["decode_kl", "encode_kl", "kl_factor", "latents_of"]


def kl_factor(config: Mapping[str, Any]) -> int:
    """Return the pixels of a side per latent pixel, by the configuration of an AutoencoderKL."""
    channels = config.get("block_out_channels")
    return int(2 ** (len(channels) - 1)) if isinstance(channels, list) and channels else 8


def encode_kl(vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None") -> "Tensor":
    """Return pictures [B, 3, H, W] as scaled latents [B, C, h, w]; without a generator the mean is taken."""
    config: Any = vae.config
    latents = latents_of(vae, pixels, generator)
    scaled: Tensor = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    return scaled


def decode_kl(vae: "nn.Module", latents: "Tensor") -> "Tensor":
    """Return scaled latents [B, C, h, w] as pictures [B, 3, H, W]."""
    config, model = vae.config, vae  # type: Any, Any
    plain = latents / config.scaling_factor + (config.shift_factor or 0.0)
    decoded: Tensor = model.decode(plain.to(model.dtype), return_dict=False)[0]
    return decoded


def latents_of(vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None") -> "Tensor":
    """Return what an autoencoder makes of pictures, before any scaling."""
    model: Any = vae
    found = model.encode(pixels.to(model.dtype)).latent_dist
    latents: Tensor = found.mode() if generator is None else found.sample(generator)
    return latents
