"""The model that is trained for pictures: the components of a pipeline under their names, and one forward over them.

Its children are called as in diffusers (`unet` or `transformer`, `text_encoder`), so that an adapter over it has
names such as `unet.down_blocks.0...`. It knows nothing of data, of loss or of adapters.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from haori.core.errors import InputError
from haori.core.quantization import Quantization

if TYPE_CHECKING:
    from haori.bases.diffusion.family import Family
    from haori.bases.diffusion.noising import Noising
    from haori.core.new_words import NewWords

__all__ = ["DiffusionConfig", "DiffusionModel", "DiffusionOutput"]

_TOKENS = "tokens_"
_LAYER = re.compile(r"(?!.*\b(visual|vision)).*\.\d+\..*")  # of text; the encoder of Qwen-Image sees too
_BLOCK = re.compile(r"(Block|ResnetBlock2D)$")
_CONVOLUTIONS = re.compile(r".*\b(resnets|downsamplers|upsamplers)\.\d+\..*")


@dataclass(frozen=True)
class DiffusionConfig:
    """What PEFT and others ask a model's `config` for.

    It has no attribute `model_type`: PEFT would take that for a model of transformers, and rename what is in it.
    """

    family: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as a table."""
        return {"model_type": self.family}


@dataclass(frozen=True)
class DiffusionOutput:
    """What the denoiser predicts: `sample` [B, C, h, w]."""

    sample: Tensor


class DiffusionModel(nn.Module):
    """A denoiser, with the text encoders that are loaded beside it.

    Args:
        family: How the denoiser is spoken to.
        noising: How noise is put in, by the base's scheduler.
        components: The denoiser and any text encoders, by name.
        quantization: How their linear layers are held, if in fewer bits.
    """

    # PEFT takes a model that does not say for one whose first layer must ask for gradients.
    is_gradient_checkpointing = False

    def __init__(
        self,
        family: "Family",
        noising: "Noising",
        components: Mapping[str, nn.Module],
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        # By these names PEFT asks before it puts an adapter over a quantised layer.
        self.is_loaded_in_4bit = quantization is not None and quantization.bits == 4
        self.is_loaded_in_8bit = quantization is not None and quantization.bits == 8
        self.family, self.noising = family, noising
        self.new_words: NewWords | None = None  # see `put_words`
        self.config = DiffusionConfig(family.name)
        for name, component in components.items():
            self.add_module(name, component)

    @property
    def denoiser(self) -> nn.Module:
        """Return the UNet or transformer."""
        found: nn.Module = getattr(self, self.family.denoiser)
        return found

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders that are loaded, by name."""
        return {name: self._modules[name] for name in self.family.text_encoders if self._modules.get(name)}  # type: ignore[misc]

    @property
    def dtype(self) -> "Any":
        """Return the dtype in which the denoiser computes: that of its first weight in floating point."""
        return next(weight.dtype for weight in self.denoiser.parameters() if weight.is_floating_point())

    @property
    def device(self) -> "Any":
        """Return the device of the denoiser."""
        return next(self.denoiser.parameters()).device

    def forward(self, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> DiffusionOutput:
        """Predict from noisy latents.

        Args:
            noisy: [B, C, h, w].
            timesteps: [B] in 0..1000.
            conditions: What the family's `embed` and `sizes` give; where a text encoder is trained, the ids and masks
                of `tokens` for it instead, under `tokens_` and their name there. All in fp32 or the model's dtype.

        Raises:
            InputError: There are tokens for a text encoder that is not loaded.
        """
        tokens = {name.removeprefix(_TOKENS): ids for name, ids in conditions.items() if name.startswith(_TOKENS)}
        given = {name: value for name, value in conditions.items() if not name.startswith(_TOKENS)}
        if tokens:
            encoders = self.text_encoders
            lacking = sorted(name for name in tokens if name.removesuffix("_mask") not in encoders)
            if lacking:
                raise InputError(
                    f"There are tokens for {lacking[0]!r}, which is not loaded; loaded are {', '.join(self._modules)}."
                )
            given |= self.family.embed(encoders, tokens)
        dtype = self.dtype
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
        return DiffusionOutput(self.family.predict(self.denoiser, noisy.to(dtype), timesteps, cast))

    def activation_checkpointing_enable(self, options: Mapping[str, Any] | None = None) -> None:
        """Keep of each block its input alone, and compute the rest again for the gradient.

        Args:
            options: For transformers' text encoders, as `activation_checkpointing_enable` takes them; the models of
                diffusers always do without reentrance.
        """
        for component in self.children():
            model: Any = component
            if hasattr(model, "enable_gradient_checkpointing"):
                model.enable_gradient_checkpointing()
            else:
                model.activation_checkpointing_enable(dict(options or {}))

    def checkpointed_blocks(self, pixels: int) -> tuple[int, int]:
        """Return how many blocks of the denoiser keep their input alone, and about the bytes of one in fp32.

        Args:
            pixels: Of all pictures of a batch.
        """
        blocks = [name for name, module in self.denoiser.named_modules() if _BLOCK.search(type(module).__name__)]
        innermost = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
        config: Any = self.denoiser.config
        widths = config.get(
            "block_out_channels"
        )  # of a UNet, whose inner levels are smaller; a transformer reads 2 x 2
        packed = 1 if widths else 4
        width = (
            widths[0] if widths else config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
        )
        return len(innermost), pixels // (self.family.latent_factor**2 * packed) * width * 4

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the first text encoder; PEFT trains tokens of it.

        Raises:
            InputError: No text encoder is loaded.
        """
        for encoder in self.text_encoders.values():
            model: Any = encoder
            found: nn.Module = model.get_input_embeddings()
            return found
        raise InputError("Tokens can only be trained in a text encoder, and none is loaded beside the denoiser.")

    def token_embeddings(self) -> dict[str, str]:
        """Return the full name of the token embedding of each text encoder that is loaded."""
        found = {}
        for encoder, model in self.text_encoders.items():
            embedding = cast(Any, model).get_input_embeddings()
            found[encoder] = next(name for name, module in self.named_modules() if module is embedding)
        return found

    def word_modules(self) -> list[str]:
        """Return the full names of the modules that hold the rows of new words; adapters train and save them whole."""
        from haori.bases.diffusion.new_words import word_modules

        return word_modules(self)

    def get_output_embeddings(self) -> None:
        """Return None: there is no head over tokens."""
        return

    def module_groups(self) -> dict[str, list[str]]:
        """Return the full names of modules that a recipe's target can mean by one word.

        `all-linear` and `attention` stand for the denoiser's blocks, as people who train with diffusers or kohya's
        scripts expect: attention, feed-forward, and what leads in and out; not the modules that only read the
        timestep. A text encoder's name stands for the linear modules of its layers, `convolutions` for those outside
        the blocks of attention (LoCon).
        """
        linear = [name for name, module in self.named_modules() if _is_linear(module)]
        blocks = [name for name in linear if re.fullmatch(self.family.adapted, name)]
        groups = {
            "all-linear": blocks,
            self.family.denoiser: blocks,
            "attention": [name for name in blocks if re.search(r"(^|\.)(attn\d*|attention)\.", name)],
            "convolutions": [
                name
                for name, module in self.denoiser.named_modules(prefix=self.family.denoiser)
                if isinstance(module, nn.Conv2d) and _CONVOLUTIONS.fullmatch(name)
            ],
        }
        for encoder in self.text_encoders:
            groups[encoder] = [name for name in linear if _LAYER.fullmatch(name) and name.startswith(f"{encoder}.")]
        return groups


def _is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear map of channels: a convolution of one pixel is one too."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1
    )
