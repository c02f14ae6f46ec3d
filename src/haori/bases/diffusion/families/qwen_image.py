"""Qwen-Image (Qwen Team 2025, arXiv 2508.02324): a transformer over packed latents and states of Qwen2.5-VL.

Its autoencoder is one for video and sees a picture as a film of one frame; latents are normalised channel by channel.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import compact_states, cut_within, padded_tokens
from haori.bases.diffusion.distillation import distillation_of
from haori.bases.diffusion.latents import latents_of
from haori.bases.diffusion.packing import pack, unpack

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["QwenImage"]

_NATIVE = 128  # latent pixels of a side
_TEXT_LENGTH = 512
_SKIPPED = 34  # tokens of the template before the caption
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_TRAINING_GUIDANCE = 1.0


class QwenImage:
    """Qwen-Image; see `haori.bases.diffusion.family.Family`."""

    name = "qwen_image"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)

    def __init__(self, configs: "PipelineConfigs") -> None:
        self._configs = configs
        self._transformer, self._vae = configs.part("transformer").config, configs.part("vae").config
        for part in ("text_encoder", "tokenizer"):
            configs.part(part)
        # What the last block writes of the text is read by nothing, so the modules that only write it learn nothing.
        last = int(self._transformer.get("num_layers", 60)) - 1
        unread = rf"(?!{last}\.(attn\.add_q_proj|attn\.to_add_out|txt_mlp)\b)"
        self.adapted = rf"transformer\.transformer_blocks\.{unread}\d+\.(attn|img_mlp|txt_mlp)\..*"

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
        stages = self._vae.get("temperal_downsample")
        return int(2 ** len(stages)) if isinstance(stages, list) else 8

    def tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return ids and mask [B, 34 + 512] of the captions within their template."""
        prompts = [_TEMPLATE.format(caption) for caption in captions]
        ids, mask = padded_tokens(tokenizers["text_encoder"], prompts, _SKIPPED + _TEXT_LENGTH)
        return {"text_encoder": ids, "text_encoder_mask": mask}

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what lies beyond the 512 tokens after the template's."""
        prompt = _TEMPLATE.format(caption)
        return cut_within(tokenizers["text_encoder"], prompt, caption, _SKIPPED + _TEXT_LENGTH)

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return the last states after the template's, `text_states` [B, 512, D], and `text_mask` of the true ones."""
        mask = tokens["text_encoder_mask"]
        found = encoders["text_encoder"](
            input_ids=tokens["text_encoder"], attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        states, kept = compact_states(found.hidden_states[-1], mask, _SKIPPED)
        return {"text_states": states, "text_mask": kept}

    def sizes(self, sizes: "Sequence[PictureSize]") -> "dict[str, Tensor]":
        """Return nothing: the transformer sees sizes from the places of tokens."""
        return {}

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return normalised latents [B, 16, H/8, W/8]."""
        latents = latents_of(vae, pixels.unsqueeze(2), generator).squeeze(2)
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return pictures [B, 3, H, W]."""
        model: Any = vae
        mean, std = _statistics(vae, latents)
        film = (latents * std + mean).unsqueeze(2)
        decoded: Tensor = model.decode(film.to(model.dtype), return_dict=False)[0][:, :, 0]
        return decoded

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return the velocity from the true tokens of `text_states`."""
        import torch

        height, width = noisy.shape[-2:]
        mask = conditions["text_mask"]
        longest = int(mask.sum(1).max())
        states, mask = conditions["text_states"][:, :longest], mask[:, :longest]
        guidance = None
        if self._transformer.get("guidance_embeds"):
            usual = torch.full((len(noisy),), _TRAINING_GUIDANCE, device=noisy.device, dtype=torch.float32)
            guidance = conditions.get("guidance", usual)
        predicted = denoiser(
            hidden_states=pack(noisy), timestep=timesteps / 1000, guidance=guidance, encoder_hidden_states=states,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy), return_dict=False,
        )[0]  # fmt: skip
        return unpack(predicted, height, width)

    def distilled(self) -> str | None:
        """Return a sentence for Lightning and the like, told by name or scheduler."""
        return distillation_of(self._configs, "Qwen-Image itself")


def _statistics(vae: "nn.Module", like: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return mean and standard deviation of the latents, each [1, C, 1, 1]."""
    config: Any = vae.config
    mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, std
