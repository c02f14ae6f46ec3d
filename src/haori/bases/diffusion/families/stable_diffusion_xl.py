"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): a UNet that reads two CLIP text encoders and sizes.

Illustrious and Pony are of its shape. The UNet reads the last states but one of both encoders side by side, the pooled
projection of the second, and six numbers: the picture's original size, the crop's corner, and the size it has now.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import cut_text, padded_tokens
from haori.bases.diffusion.distillation import distillation_of, distilled_sentence
from haori.bases.diffusion.latents import decode_kl, encode_kl, kl_factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["StableDiffusionXL"]


class StableDiffusionXL:
    """Stable Diffusion XL; see `haori.bases.diffusion.family.Family`."""

    name = "sdxl"
    denoiser = "unet"
    text_encoders = ("text_encoder", "text_encoder_2")
    adapted = r"unet\..*\battentions\.\d+\..*"

    def __init__(self, configs: "PipelineConfigs") -> None:
        self._configs = configs
        self._unet, self._vae = configs.part("unet").config, configs.part("vae").config
        for part in (*self.text_encoders, "tokenizer", "tokenizer_2"):
            configs.part(part)

    @property
    def native_size(self) -> int:
        """Return the UNet's sample size in pixels."""
        return int(self._unet.get("sample_size") or 128) * self.latent_factor

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
        """Return ids [B, 77] for both encoders, whose tokenizers differ in what they pad with."""
        return {
            name: padded_tokens(tokenizer, captions, tokenizer.model_max_length)[0]
            for name, tokenizer in tokenizers.items()
        }

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what lies beyond the 77 tokens that CLIP reads."""
        return cut_text(tokenizers["text_encoder"], caption, tokenizers["text_encoder"].model_max_length)

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return `text_states` [B, T, D] of the first, `text_states_2` and `pooled` [B, P] of the second encoder."""
        found: dict[str, Tensor] = {}
        if "text_encoder" in tokens:
            first = encoders["text_encoder"](tokens["text_encoder"], output_hidden_states=True)
            found["text_states"] = first.hidden_states[-2]
        if "text_encoder_2" in tokens:
            second = encoders["text_encoder_2"](tokens["text_encoder_2"], output_hidden_states=True)
            found |= {"text_states_2": second.hidden_states[-2], "pooled": second.text_embeds}
        return found

    def sizes(self, sizes: "Sequence[PictureSize]") -> "dict[str, Tensor]":
        """Return `time_ids` [B, 6], whole numbers."""
        import torch

        return {"time_ids": torch.tensor([[*size.original, *size.crop, *size.target] for size in sizes])}

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return scaled latents [B, 4, H/8, W/8]."""
        return encode_kl(vae, pixels, generator)

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return pictures [B, 3, H, W]."""
        return decode_kl(vae, latents)

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return what the UNet predicts from both texts, `pooled` and `time_ids`."""
        import torch

        states = torch.cat([conditions["text_states"], conditions["text_states_2"]], dim=-1)
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]}
        predicted: Tensor = denoiser(noisy, timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
        return predicted

    def distilled(self) -> str | None:
        """Return a sentence for SDXL Turbo, Lightning, LCM and the like."""
        if self._unet.get("time_cond_proj_dim"):
            return distilled_sentence(self._configs, "its UNet reads a guidance scale, as LCM's does", "SDXL itself")
        return distillation_of(self._configs, "SDXL itself")
