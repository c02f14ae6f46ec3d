"""FLUX.2 klein (Black Forest Labs 2025): a transformer over normalised 2 x 2 squares of latents, and states of Qwen3.

Its autoencoder normalises squares of latents by the running mean and variance of a batch norm. What the denoiser sees
are those squares, so a latent here has 4 x 32 channels and a factor of 16.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.bases.diffusion.captions import cut_within, padded_tokens
from haori.bases.diffusion.distillation import distillation_of, distilled_sentence
from haori.bases.diffusion.latents import kl_factor, latents_of
from haori.bases.diffusion.packing import grid_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs
    from haori.bases.diffusion.family import PictureSize

__all__ = ["Flux2Klein"]

_NATIVE = 64  # latent pixels (squares) of a side
_TEXT_LENGTH = 512
_LAYERS = (9, 18, 27)  # whose states are read, side by side


class Flux2Klein:
    """FLUX.2 klein; see `haori.bases.diffusion.family.Family`."""

    name = "flux2"
    denoiser = "transformer"
    text_encoders = ("text_encoder",)
    adapted = r"transformer\.(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\..*"

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
        """Return the pixels of a side per square of latents."""
        return self.latent_factor

    @property
    def latent_channels(self) -> int:
        """Return the channels of a square."""
        return int(self._transformer.get("in_channels", 128))

    @property
    def latent_factor(self) -> int:
        """Return the pixels of a side per square of latents."""
        return 2 * kl_factor(self._vae)

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
        """Return `text_states` [B, T, 3D]: three layers side by side, of padding too, which the transformer reads."""
        import torch

        found = encoders["text_encoder"](
            input_ids=tokens["text_encoder"], attention_mask=tokens["text_encoder_mask"], output_hidden_states=True,
            use_cache=False,
        )  # fmt: skip
        return {"text_states": torch.cat([found.hidden_states[layer] for layer in _LAYERS], dim=-1)}

    def sizes(self, sizes: "Sequence[PictureSize]") -> "dict[str, Tensor]":
        """Return nothing: the transformer sees sizes from the places of tokens."""
        return {}

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return normalised squares of latents [B, 128, H/16, W/16]."""
        latents = latents_of(vae, pixels, generator)
        batch, channels, height, width = latents.shape
        squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        mean, std = _statistics(vae, latents)
        return (squares.reshape(batch, channels * 4, height // 2, width // 2) - mean) / std

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return pictures [B, 3, H, W]."""
        model: Any = vae
        mean, std = _statistics(vae, latents)
        batch, channels, height, width = latents.shape
        squares = (latents * std + mean).reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        plain = squares.reshape(batch, channels // 4, height * 2, width * 2)
        decoded: Tensor = model.decode(plain.to(model.dtype), return_dict=False)[0]
        return decoded

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return the velocity from `text_states`."""
        import torch

        batch, channels, height, width = noisy.shape
        states = conditions["text_states"]
        text_ids = torch.zeros(states.shape[1], 4, device=states.device)
        text_ids[:, 3] = torch.arange(states.shape[1], device=states.device)
        predicted = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2), timestep=timesteps / 1000, guidance=None,
            encoder_hidden_states=states, txt_ids=text_ids.expand(batch, -1, -1),
            img_ids=grid_ids(height, width, 4, noisy.device).expand(batch, -1, -1), return_dict=False,
        )[0]  # fmt: skip
        found: Tensor = predicted.transpose(1, 2).reshape(batch, channels, height, width)
        return found

    def distilled(self) -> str | None:
        """Return a sentence for the distilled klein, which its index tells."""
        if self._configs.index.get("is_distilled"):
            return distilled_sentence(self._configs, "its index says so", "the klein base of the same size")
        return distillation_of(self._configs, "the klein base of the same size")


def _prompt(tokenizer: Any, caption: str) -> str:
    messages = [{"role": "user", "content": caption}]
    prompt: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return prompt


def _statistics(vae: "nn.Module", like: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return mean and standard deviation of squares of latents, each [1, 4C, 1, 1]."""
    norm, config = vae.bn, vae.config  # type: Any, Any
    mean = norm.running_mean.reshape(1, -1, 1, 1)
    std = (norm.running_var.reshape(1, -1, 1, 1) + config.batch_norm_eps).sqrt()
    return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)
