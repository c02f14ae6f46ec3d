"""Loads one component of a pipeline, with its weights or as a skeleton without, by the class its index names."""

from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.diffusion.configs import Part, PipelineConfigs, read_configs
from haori.bases.load_errors import LOAD_ERRORS, explain_load_errors, first_line
from haori.bases.pipeline import weights_variant
from haori.bases.quantising import quantise_linears
from haori.bases.quiet import quiet_diffusers
from haori.core.errors import BaseError
from haori.core.quantization import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["build_component", "class_of", "load_component"]


def load_component(
    base: Base,
    name: str,
    *,
    dtype: "torch.dtype",
    device: str,
    quantization: Quantization | None = None,
    configs: PipelineConfigs | None = None,
) -> "nn.Module":
    """Load a component in evaluation mode with every weight frozen.

    Args:
        base: The base.
        name: The component, such as `unet`.
        dtype: Of its weights.
        device: Where to.
        quantization: Quantise its linear layers to this.
        configs: What the base's files say, where that is known already.

    Raises:
        BaseError: The base lacks it, its class is unknown, weights are missing or of another shape, or it does not fit
            into memory.
        MissingExtraError: Quantisation is asked for without bitsandbytes.
    """
    part = (configs or read_configs(base)).part(name)
    kind: Any = class_of(base, part)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if part.library == "transformers":
        options["trust_remote_code"] = False
    if device != "cpu" and quantization is None:
        options["device_map"] = {"": device}
    if variant := weights_variant(part.path):
        options["variant"] = variant
    with explain_load_errors(base, device), quiet_diffusers():
        model, report = kind.from_pretrained(part.path, output_loading_info=True, **options)
    lacking = sorted({*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    if lacking:
        raise BaseError(
            f"The weight files of {name!r} in {base.name!r} lack {len(lacking)} of its weights, such as "
            f"{lacking[0]!r}; its config.json and weights do not belong together."
        )
    if quantization is not None:
        with explain_load_errors(base, device):
            quantise_linears(base, model, quantization, dtype, device)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def build_component(base: Base, part: Part) -> "nn.Module":
    """Build a component without weights or memory.

    Raises:
        BaseError: Its class is unknown, or cannot be built from its configuration.
    """
    import torch

    kind: Any = class_of(base, part)
    try:
        with quiet_diffusers(), torch.device("meta"):
            if part.library == "transformers":
                config = kind.config_class.from_pretrained(part.path, local_files_only=True)
                built: nn.Module = kind(config)
            else:
                built = kind.from_config(dict(part.config))
    except LOAD_ERRORS as error:
        raise BaseError(
            f"The component {part.path.name!r} of {base.name!r} cannot be built: {first_line(error)}."
        ) from (error)
    return built.eval()


def class_of(base: Base, part: Part) -> type:
    """Return the class that reads a part; only classes of diffusers and transformers are taken.

    Raises:
        BaseError: There is no such class.
    """
    from importlib import import_module

    if part.library not in {"diffusers", "transformers"}:
        raise BaseError(
            f"The part {part.path.name!r} of {base.name!r} is read by {part.library}.{part.kind}; only classes of "
            "diffusers and transformers are used."
        )
    found = getattr(import_module(part.library), part.kind, None)
    if not isinstance(found, type):
        raise BaseError(
            f"The part {part.path.name!r} of {base.name!r} is a {part.kind}, which the installed {part.library} does "
            "not know; a newer one may."
        )
    return found
