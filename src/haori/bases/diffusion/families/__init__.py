"""The families of image bases, and which one a base belongs to. A new one is a file here and a line in `FAMILIES`."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from haori.bases.diffusion.configs import read_configs
from haori.core.errors import BaseError, nearest

if TYPE_CHECKING:
    from haori.bases.base import Base
    from haori.bases.diffusion.family import Family

__all__ = ["FAMILIES", "family_of"]

FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl.StableDiffusionXL",
    "FluxPipeline": "flux1.Flux1",
    "Flux2KleinPipeline": "flux2.Flux2Klein",
    "ZImagePipeline": "z_image.ZImage",
    "QwenImagePipeline": "qwen_image.QwenImage",
}
"""Class of a diffusers pipeline -> module and class of the family that serves it."""


def family_of(base: "Base") -> "Family":
    """Return the family of a base, made for it.

    Raises:
        BaseError: It is no pipeline, one of a family that is not here, or lacks a part that the family works with.
    """
    configs = read_configs(base)
    place = FAMILIES.get(configs.pipeline)
    if place is None:
        hint = nearest(configs.pipeline, FAMILIES) or ""
        raise BaseError(
            f"The base {base.name!r} is a {configs.pipeline}, which belongs to no family that can be trained here; "
            f"{hint + ' ' if hint else ''}Known are {', '.join(sorted(FAMILIES))}."
        )
    module, _, name = place.partition(".")
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)(configs)
    return family
