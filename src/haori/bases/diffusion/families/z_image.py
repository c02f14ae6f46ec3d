"""Z-Image (Z-Image Team 2025, arXiv 2511.22699): a single-stream transformer over latents and states of Qwen3.

Its transformer counts time from noise to picture and predicts x_0 - e; both are turned round here, so that timesteps
and velocities mean what they do elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import compact_states, cut_within, padded_tokens
from haori.bases.diffusion.distillation import distillation_of
from haori.bases.diffusion.latents import decode_kl, encode_kl, kl_factor

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["ZImage"]

_NATIVE = 128  # latent pixels of a side
_TEXT_LENGTH = 512


class ZImage:
    """Z-Image; see `haori.bases.diffusion.family.Family`."""

    name = "z_image"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    # Without the refiners of noise and text, as trainers of this family leave them.
    adapted = r"transformer\.layers\.\d+\.(attention|feed_forward)\..*"

    def __init__(self, configs: "PipelineConfigs") -> None:
        self._configs = configs
        self._transformer, self._vae = configs.part("transformer").config, configs.part("vae").config
        for part in ("text_encoder", "tokenizer"):
            configs.part(part)

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
        """Return the channels that the transformer reads."""
        return int(self._transformer.get("in_channels", 16))

    @property
    def latent_factor(self) -> int:
        """Return the pixels of a side per latent pixel."""
        return kl_factor(self._vae)

    def tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return ids and mask [B, 512] of the captions as a user's messages."""
        tokenizer = tokenizers["text_encoder"]
        ids, mask = padded_tokens(tokenizer, [_prompt(tokenizer, caption) for caption in captions], _TEXT_LENGTH)
        return {"text_encoder": ids, "text_encoder_mask": mask}

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what lies beyond the 512 tokens."""
        tokenizer = tokenizers["text_encoder"]
        return cut_within(tokenizer, _prompt(tokenizer, caption), caption, _TEXT_LENGTH)

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return the last states but one, `text_states` [B, T, D], and `text_mask` [B, T] of those that count."""
        mask = tokens["text_encoder_mask"].bool()
        found = encoders["text_encoder"](
            input_ids=tokens["text_encoder"], attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        states, kept = compact_states(found.hidden_states[-2], mask)
        return {"text_states": states, "text_mask": kept}

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
        """Return the velocity e - x_0, from the true tokens of `text_states`."""
        import torch

        pictures = list(noisy.unsqueeze(2).unbind(0))  # [C, 1, h, w] each
        texts = [states[kept] for states, kept in zip(conditions["text_states"], conditions["text_mask"], strict=True)]
        predicted = denoiser(pictures, (1000 - timesteps) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(predicted)).squeeze(2)

    def distilled(self) -> str | None:
        """Return a sentence for Z-Image-Turbo, told by its name."""
        return distillation_of(self._configs, "Z-Image itself")


def _prompt(tokenizer: Any, caption: str) -> str:
    messages = [{"role": "user", "content": caption}]
    prompt: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return prompt
