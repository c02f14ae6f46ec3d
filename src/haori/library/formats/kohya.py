"""kohya's naming for Stable Diffusion 1, 2 and XL, as sd-scripts, LyCORIS and OneTrainer write it.

A module's name is its path with underscores behind `lora_unet_`, `lora_te_` (SD) or `lora_te1_` and `lora_te2_` (SDXL);
LyCORIS's own wrapper writes `lycoris_`. The UNet's paths are diffusers', or Stability's in SDXL files of sd-scripts.
Factors are those of LoRA, LoCon, LoHa, LoKr, `diff` and norms, each with or without DoRA's magnitude.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError
from haori.library.families import family_of
from haori.library.formats.bundled_words import is_bundled
from haori.library.formats.format import Source
from haori.library.formats.kohya_factors import kohya_tensors
from haori.library.formats.kohya_flux import FORMAT as TRANSFORMERS
from haori.library.formats.kohya_metadata import kohya_metadata
from haori.library.formats.lycoris_scales import with_rank_stabilised_scales
from haori.library.formats.safetensors_writing import write_hashed
from haori.library.formats.scaling import with_one_alpha
from haori.library.formats.tensor_names import place_modules, read_modules, split_key
from haori.library.formats.underscored_names import underscored
from haori.library.formats.unet_names import clip_module, sgm_name, unet_module
from haori.library.update_shapes import weight_shape
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from haori.core.records import AdapterCard

__all__ = ["FORMAT"]

_PREFIXES: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_UNET = ("lora_unet_", "lycoris_")
_UNET_ROOT = re.compile(
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|conv_in|conv_out|conv_norm_out"
    r"|time_embed|time_embedding|label_emb|add_embedding|out)_"
)
_KERNEL_3 = re.compile(r"(^|\.)(conv|conv1|conv2|conv_in|conv_out)$")
_KERNEL_1 = re.compile(r"(^|\.)conv_shortcut$")
_PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)$")


class Kohya:
    """The format, for UNets."""

    name = "kohya"
    title = "kohya and LyCORIS for Stable Diffusion 1, 2 and XL"

    def detect(self, source: Source) -> bool:
        """Say whether modules are named so: some of a UNet, or else text encoders of CLIP alone."""
        modules = {split[0] for key in source.tensors if (split := split_key(key)) is not None}
        ours = {module for module in modules if module.startswith(tuple(_PREFIXES))}
        images = {module for module in ours if module.startswith(_UNET)}
        if any(_UNET_ROOT.match(f"{_without_prefix(module)}_") for module in images):
            return True
        return bool(ours) and not images and not any(module.startswith("lora_te3_") for module in modules)

    def read(self, source: Source) -> AdapterUpdates:
        """Read the file into the neutral form.

        Raises:
            FileFormatError: A key is of no known module or method, or tensors do not fit together.
        """
        named = read_modules(source)
        placed = place_modules(source, named.modules, _neutral_name)
        modules = with_rank_stabilised_scales(placed, source.metadata)
        updates = AdapterUpdates(modules, source.metadata, self.name, extra=named.extra)
        family = family_of(updates, _likely_family(named.modules))
        shaped = {name: _with_kernel(name, update, family) for name, update in modules.items()}
        return replace(updates, modules=shaped, family=family)

    def write(
        self,
        updates: AdapterUpdates,
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a safetensors file with kohya's metadata and hashes.

        Modules of SDXL get Stability's names, those of other families diffusers' ones, as sd-scripts has it.

        Raises:
            InputError: The adapter changes something else than a UNet and CLIP.
        """
        if "transformer" in updates.components:
            TRANSFORMERS.write(updates, path, card)
            return
        family = updates.family or family_of(updates)
        names = {name: _kohya_name(name, family) for name in updates.modules}
        if foreign := sorted(name for name, own in names.items() if own is None):
            raise InputError(
                f"kohya's format for Stable Diffusion holds the UNet and the CLIP text encoders, and has no name for "
                f"the module {foreign[0]!r}, one of {len(foreign)} such. Write this adapter as peft or diffusers."
            )
        if others := sorted(key for key in updates.extra if not is_bundled(key)):
            raise InputError(
                f"kohya's format holds no tensor such as {others[0]!r}, which the adapter has beside LoRA."
            )
        tensors = dict(updates.extra)
        updates = replace(updates, modules=with_one_alpha(updates.modules))
        for name, update in updates.modules.items():
            tensors |= {f"{names[name]}.{end}": tensor for end, tensor in kohya_tensors(update).items()}
        write_hashed(path, tensors, kohya_metadata(updates, family, card, path.stem))


def _without_prefix(module: str) -> str:
    return next((module.removeprefix(prefix) for prefix in _PREFIXES if module.startswith(prefix)), module)


def _neutral_name(module: str) -> str | None:
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
    if prefix is None:
        return None
    component, path = _PREFIXES[prefix], module.removeprefix(prefix)
    found = unet_module(path) if component == "unet" else clip_module(path)
    return None if found is None else f"{component}.{found}"


def _kohya_name(module: str, family: str | None) -> str | None:
    component, _, path = module.partition(".")
    if component == "unet" and unet_module(path) == path:
        own = sgm_name(path) if family == "sdxl" else path
        return None if own is None else f"lora_unet_{underscored(own)}"
    prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    if component not in prefix or clip_module(path) is None:
        return None
    return f"{prefix[component]}{underscored(path)}"


def _likely_family(modules: Mapping[str, ModuleUpdate]) -> str | None:
    """Return what the prefixes suggest: `lora_te_` is written for one text encoder, `input_blocks` for SDXL."""
    if any(
        module.startswith(("lora_te2_", "lora_unet_input_blocks_", "lora_unet_output_blocks_")) for module in modules
    ):
        return "sdxl"
    return "sd15" if all(module.startswith("lora_te_") for module in modules) else None


def _with_kernel(name: str, update: ModuleUpdate, family: str | None) -> ModuleUpdate:
    """Give LoHa and LoKr, which flatten kernels, the shape of the convolution that a UNet has of that name."""
    shape = weight_shape(update)
    if update.kind not in {"loha", "lokr"} or shape is None or len(shape) != 2 or not name.startswith("unet."):
        return update
    if _KERNEL_3.search(name) and shape[1] % 9 == 0:
        return replace(update, shape=(shape[0], shape[1] // 9, 3, 3))
    if _KERNEL_1.search(name) or (family == "sd15" and _PROJECTION.search(name)):
        return replace(update, shape=(*shape, 1, 1))
    return update


FORMAT = Kohya()
