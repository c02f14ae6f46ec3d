"""Loads a pipeline's denoiser and text encoders as one model to train, or builds it without weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.bases.base import Base
from haori.bases.diffusion.components import build_component, load_component
from haori.bases.diffusion.configs import read_configs
from haori.bases.diffusion.extra import require_diffusers
from haori.bases.diffusion.families import family_of
from haori.bases.diffusion.noising import noising_of
from haori.bases.dtype import choose_dtype, default_device, torch_dtype
from haori.bases.load_errors import check_device
from haori.core.errors import BaseError
from haori.core.quantization import Quantization

if TYPE_CHECKING:
    from haori.bases.diffusion.family import Family
    from haori.bases.diffusion.model import DiffusionModel

__all__ = ["load_diffusion_model", "load_diffusion_skeleton"]


def load_diffusion_model(
    base: Base,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantization: Quantization | None = None,
    components: Sequence[str] | None = None,
) -> "DiffusionModel":
    """Load components of a pipeline as one model, in evaluation mode with every weight frozen.

    Args:
        base: A base with a pipeline.
        dtype: `auto`, `fp32`, `bf16` or `fp16`; see `choose_dtype`.
        device: `cpu`, `cuda`, `cuda:1`; None takes the GPU where there is one.
        quantization: Quantise the linear layers of what is loaded.
        components: The denoiser and any text encoders; None means all of them.

    Raises:
        BaseError: The base is no pipeline of a known family, lacks a component, or cannot be loaded.
        InputError: The dtype is unknown, or the device is not there.
        MissingExtraError: diffusers is not installed, or bitsandbytes where it is needed.
    """
    from haori.bases.diffusion.model import DiffusionModel

    require_diffusers()
    device_name = device or default_device()
    check_device(device_name)
    number_format = torch_dtype(choose_dtype(dtype, device_name).name)
    configs, family = read_configs(base), family_of(base)
    loaded = {
        name: load_component(
            base, name, dtype=number_format, device=device_name, configs=configs, quantization=quantization
        )
        for name in _wanted(base, family, components)
    }  # fmt: skip
    noising = noising_of(configs.part("scheduler").config)
    return DiffusionModel(family, noising, loaded, quantization).requires_grad_(False).eval()


def load_diffusion_skeleton(base: Base, components: Sequence[str] | None = None) -> "DiffusionModel":
    """Build the same model without weights or memory, to look at its names and shapes.

    Raises:
        BaseError: As for `load_diffusion_model`.
        MissingExtraError: diffusers is not installed.
    """
    from haori.bases.diffusion.model import DiffusionModel

    require_diffusers()
    configs, family = read_configs(base), family_of(base)
    built = {name: build_component(base, configs.part(name)) for name in _wanted(base, family, components)}
    return DiffusionModel(family, noising_of(configs.part("scheduler").config), built)


def _wanted(base: Base, family: "Family", components: Sequence[str] | None) -> list[str]:
    known = [family.denoiser, *family.text_encoders]
    if components is None:
        return known
    strange = [name for name in components if name not in known]
    if strange:
        raise BaseError(f"{strange[0]!r} of {base.name!r} is not trained; there are {', '.join(known)}.")
    # The denoiser is what predicts, whatever is trained.
    return [name for name in known if name in components or name == family.denoiser]
