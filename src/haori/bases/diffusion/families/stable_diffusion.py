"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv 2112.10752): a UNet that reads one CLIP text encoder.

The second differs in its text encoder (OpenCLIP, 1024 wide) and, in its 768-pixel form, in predicting velocity, which
the scheduler says. Any base of the same parts belongs here too, whatever its widths.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import cut_text, padded_tokens
from haori.bases.diffusion.distillation import distillation_of
from haori.bases.diffusion.latents import decode_kl, encode_kl, kl_factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["StableDiffusion"]

_SD2_CONTEXT = 1024  # width of the text states that its cross-attention reads


class StableDiffusion:
    """Stable Diffusion 1 and 2; see `haori.bases.diffusion.family.Family`."""

    denoiser = "unet"
    text_encoders = ("text_encoder",)
    # The transformer blocks with what leads in and out of them, as kohya's scripts adapt them.
    adapted = r"unet\..*\battentions\.\d+\..*"

    def __init__(self, configs: "PipelineConfigs") -> None:
        self._configs = configs
        self._unet = configs.part("unet").config
        self._vae = configs.part("vae").config
        self._reads_mask = bool(configs.part("text_encoder").config.get("use_attention_mask"))
        configs.part("tokenizer")
        self.name = "sd2" if self._unet.get("cross_attention_dim") == _SD2_CONTEXT else "sd15"

    @property
    def native_size(self) -> int:
        """Return the UNet's sample size in pixels."""
        return int(self._unet.get("sample_size") or 64) * self.latent_factor

    @property
    def size_multiple(self) -> int:
        """Return the pixels of a side per latent pixel."""
        return self.latent_factor

    @property
    def latent_channels(self) -> int:
        """Return the channels that the UNet reads."""
        return int(self._unet.get("in_channels", 4))

    @property
    def latent_factor(self) -> int:
        """Return the pixels of a side per latent pixel."""
        return kl_factor(self._vae)

    def tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return ids [B, 77], and their mask where the encoder's configuration wants one."""
        ids, mask = padded_tokens(tokenizers["text_encoder"], captions, tokenizers["text_encoder"].model_max_length)
        return {"text_encoder": ids, **({"text_encoder_mask": mask} if self._reads_mask else {})}

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what lies beyond the 77 tokens that CLIP reads."""
        return cut_text(tokenizers["text_encoder"], caption, tokenizers["text_encoder"].model_max_length)

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return the last hidden states, `text_states` [B, T, D]."""
        found = encoders["text_encoder"](tokens["text_encoder"], attention_mask=tokens.get("text_encoder_mask"))
        return {"text_states": found[0]}

    def sizes(self, sizes: "Sequence[PictureSize]") -> "dict[str, Tensor]":
        """Return nothing: the UNet is not told of sizes."""
        return {}

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return scaled latents [B, 4, H/8, W/8]."""
        return encode_kl(vae, pixels, generator)

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return pictures [B, 3, H, W]."""
        return decode_kl(vae, latents)

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return what the UNet predicts from `text_states`."""
        predicted: Tensor = denoiser(noisy, timesteps, conditions["text_states"], return_dict=False)[0]
        return predicted

    def distilled(self) -> str | None:
        """Return a sentence for SD Turbo, LCM and the like, told by name or scheduler."""
        return distillation_of(self._configs, "Stable Diffusion itself")
