"""FLUX.1 dev and schnell (Black Forest Labs 2024): a transformer over packed latents that reads CLIP and T5.

`dev` was distilled from guided predictions and is told a guidance scale; trained without guidance, at 1, an adapter
learns the pictures themselves and works at the usual 3.5. `schnell` reads none and half as much text.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import cut_text, padded_tokens
from haori.bases.diffusion.distillation import distillation_of, distilled_sentence
from haori.bases.diffusion.latents import decode_kl, encode_kl, kl_factor
from haori.bases.diffusion.packing import grid_ids, pack, unpack

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["Flux1"]

_NATIVE = 128  # latent pixels of a side
_TRAINING_GUIDANCE = 1.0


class Flux1:
    """FLUX.1; see `haori.bases.diffusion.family.Family`."""

    name = "flux1"
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2")
    adapted = r"transformer\.(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)\b.*"

    def __init__(self, configs: "PipelineConfigs") -> None:
        self._configs = configs
        self._transformer, self._vae = configs.part("transformer").config, configs.part("vae").config
        for part in (*self.text_encoders, "tokenizer", "tokenizer_2"):
            configs.part(part)

    @property
    def guided(self) -> bool:
        """Say whether the transformer is told a guidance scale."""
        return bool(self._transformer.get("guidance_embeds", False))

    @property
    def text_length(self) -> int:
        """Return the tokens that T5 reads."""
        return 512 if self.guided else 256

    @property
    def native_size(self) -> int:
        """Return 1024 for the bases that there are."""
        return _NATIVE * self.latent_factor

    @property
    def size_multiple(self) -> int:
        """Return two latent pixels, which make a token."""
        return 2 * self.latent_factor

    @property
    def latent_channels(self) -> int:
        """Return the channels before packing."""
        return int(self._transformer.get("in_channels", 64)) // 4

    @property
    def latent_factor(self) -> int:
        """Return the pixels of a side per latent pixel."""
        return kl_factor(self._vae)

    def tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return CLIP's ids [B, 77] and T5's [B, 512], or 256 for schnell; padding is read as text, without a mask."""
        lengths = {"text_encoder": tokenizers["text_encoder"].model_max_length, "text_encoder_2": self.text_length}
        return {name: padded_tokens(tokenizers[name], captions, length)[0] for name, length in lengths.items()}

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what lies beyond T5's tokens; CLIP only gives a summary of the first 77."""
        return cut_text(tokenizers["text_encoder_2"], caption, self.text_length)

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return CLIP's `pooled` [B, P] and T5's `text_states` [B, T, D]."""
        found: dict[str, Tensor] = {}
        if "text_encoder" in tokens:
            found["pooled"] = encoders["text_encoder"](tokens["text_encoder"]).pooler_output
        if "text_encoder_2" in tokens:
            found["text_states"] = encoders["text_encoder_2"](tokens["text_encoder_2"])[0]
        return found

    def sizes(self, sizes: "Sequence[PictureSize]") -> "dict[str, Tensor]":
        """Return nothing: the transformer sees sizes from the places of tokens."""
        return {}

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return shifted and scaled latents [B, 16, H/8, W/8]."""
        return encode_kl(vae, pixels, generator)

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return pictures [B, 3, H, W]."""
        return decode_kl(vae, latents)

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return the velocity, from `pooled`, `text_states` and, where the base reads one, `guidance` [B], else 1."""
        import torch

        height, width = noisy.shape[-2:]
        states = conditions["text_states"]
        guidance = None
        if self.guided:
            usual = torch.full((len(noisy),), _TRAINING_GUIDANCE, device=noisy.device, dtype=torch.float32)
            guidance = conditions.get("guidance", usual)
        predicted = denoiser(
            hidden_states=pack(noisy), timestep=timesteps / 1000, guidance=guidance,
            pooled_projections=conditions["pooled"], encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=states.device),
            img_ids=grid_ids(height // 2, width // 2, 3, noisy.device), return_dict=False,
        )[0]  # fmt: skip
        return unpack(predicted, height, width)

    def distilled(self) -> str | None:
        """Return a sentence for schnell, told by its lack of a guidance scale."""
        if not self.guided:
            return distilled_sentence(self._configs, "it reads no guidance scale, as schnell does", "FLUX.1 dev")
        return distillation_of(self._configs, "FLUX.1 dev")
