"""What is asked of a family of image bases: how it reads captions, pictures and noise, and predicts.

One denoiser (a UNet or a transformer) predicts from noisy latents, a timestep and conditions made of text. How its
latents are scaled and packed, what it reads of a caption and which numbers go beside are the family's own business;
everything else in the package sees latents as [B, C, h, w] and conditions as tensors [B, ...].
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haori.bases.diffusion.configs import PipelineConfigs

__all__ = ["Family", "PictureSize"]


class PictureSize(NamedTuple):
    """How a picture came to its size, in pixels, each as (height, width) or (top, left)."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Family(Protocol):
    """A family of image bases, made for one base by its configurations.

    Attributes:
        name: Its name, as adapters are filed under: sd15, sd2, sdxl, flux1, flux2, z_image, qwen_image.
        denoiser: Name of the component that predicts, `unet` or `transformer`.
        text_encoders: Names of the components that read captions, in order.
        adapted: Regular expression for the full names of modules that `all-linear` stands for.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    adapted: str

    def __init__(self, configs: "PipelineConfigs") -> None:
        """Take what the family must know of one base from its configurations."""

    @property
    def native_size(self) -> int:
        """Return the side in pixels of the square pictures that the base was made for."""

    @property
    def size_multiple(self) -> int:
        """Return what both sides of a picture in pixels must divide by."""

    @property
    def latent_channels(self) -> int:
        """Return the channels C of a latent."""

    @property
    def latent_factor(self) -> int:
        """Return the pixels of a side per latent pixel."""

    def tokens(self, tokenizers: Mapping[str, Any], captions: Sequence[str]) -> "dict[str, Tensor]":
        """Return the captions as token ids.

        Args:
            tokenizers: By the component that reads what they write.
            captions: B texts.

        Returns:
            For each component C of the tokenizers, `C` [B, T] ids and, where it needs one, `C_mask` [B, T].
        """

    def cut(self, tokenizers: Mapping[str, Any], caption: str) -> str:
        """Return what no text encoder reads of a caption because it is too long; empty if all is read."""

    def embed(self, encoders: "Mapping[str, nn.Module]", tokens: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Return what `predict` takes of the captions, as far as the components in `tokens` give it.

        Args:
            encoders: Text encoders by component; those that `tokens` has ids for are needed.
            tokens: From `tokens`.

        Returns:
            Tensors [B, ...] of the same shapes for every caption, so that those of several can be stacked.
        """

    def sizes(self, sizes: Sequence[PictureSize]) -> "dict[str, Tensor]":
        """Return the conditions [B, ...] that tell the denoiser of the sizes of pictures; none for most families."""

    def encode(self, vae: "nn.Module", pixels: "Tensor", generator: "torch.Generator | None" = None) -> "Tensor":
        """Return pictures as latents, scaled as the denoiser sees them.

        Args:
            vae: The base's autoencoder.
            pixels: [B, 3, H, W] in -1..1, H and W multiples of `size_multiple`.
            generator: Draws from the autoencoder's distribution; None takes its mean.

        Returns:
            [B, C, h, w].
        """

    def decode(self, vae: "nn.Module", latents: "Tensor") -> "Tensor":
        """Return latents [B, C, h, w] as pictures [B, 3, H, W], about -1..1."""

    def predict(
        self, denoiser: "nn.Module", noisy: "Tensor", timesteps: "Tensor", conditions: "Mapping[str, Tensor]"
    ) -> "Tensor":
        """Return the denoiser's prediction.

        Args:
            denoiser: The UNet or transformer, with or without adapters.
            noisy: [B, C, h, w].
            timesteps: [B] in 0..1000.
            conditions: From `embed` and `sizes`.

        Returns:
            [B, C, h, w]: noise, velocity or sample, as the base's scheduler says.
        """

    def distilled(self) -> str | None:
        """Return a sentence for a base that was distilled to few steps: what that means for training; else None."""
