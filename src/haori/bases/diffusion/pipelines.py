"""A base as the stock pipeline of diffusers, for pictures, with live modules in place of those on disk."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.diffusion.components import class_of, load_component
from haori.bases.diffusion.configs import read_configs
from haori.bases.diffusion.extra import require_diffusers
from haori.bases.dtype import choose_dtype, default_device, torch_dtype
from haori.bases.load_errors import explain_load_errors
from haori.bases.quiet import quiet_diffusers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

__all__ = ["pipeline_of"]

# It only looks at finished pictures, and its weights are not needed to make them.
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def pipeline_of(
    base: Base,
    components: "Mapping[str, nn.Module] | None" = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    tokenizers: "Mapping[str, Any] | None" = None,
) -> "DiffusionPipeline":
    """Return a base as a pipeline of diffusers.

    Args:
        base: A base with a pipeline.
        components: Modules to use as they are, by name, such as a `unet` with adapters in it; the others are loaded.
        dtype: Of those that are loaded; see `choose_dtype`.
        device: Where to load them.
        tokenizers: To use in place of the base's, by the pipeline's names of them.

    Raises:
        BaseError: The base is no pipeline, or cannot be loaded.
        MissingExtraError: diffusers is not installed.
    """
    require_diffusers()
    import diffusers

    at = device or default_device()
    number_format = torch_dtype(choose_dtype(dtype, at).name)
    configs, live = read_configs(base), dict(components or {})
    given: dict[str, Any] = {name: None for name in _LEFT_OUT if name in configs.index and name not in live}
    if "safety_checker" in configs.index:
        given |= {"safety_checker": None, "requires_safety_checker": False}
    for name in base.components:
        if name not in live and name not in given:
            live[name] = load_component(base, name, dtype=number_format, device=at, configs=configs)
    with explain_load_errors(base, at), quiet_diffusers():
        for part in configs.parts.values():
            class_of(base, part)
        kind: Any = getattr(diffusers, configs.pipeline)
        pipeline: DiffusionPipeline = kind.from_pretrained(
            base.path, local_files_only=True, **given, **live, **(tokenizers or {})
        )
        pipeline.set_progress_bar_config(disable=True)
    return pipeline
