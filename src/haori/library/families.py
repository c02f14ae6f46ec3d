"""Which kind of image base an adapter was made for: told by its shapes and modules, what its header says beside it.

Two bases of one family have modules of the same names and shapes, so an adapter fits both; whether it was made for
that very base is another question (Flux.1 dev or schnell, SDXL or a fine-tune of it), which no shape answers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import BaseError
from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.core.records import BaseReference
    from haori.library.updates import AdapterUpdates

__all__ = ["FAMILY_TITLES", "Family", "family_of", "is_runnable", "reference_of", "stated_family", "tell_family"]

FAMILY_TITLES: Mapping[str, str] = {
    "sd15": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux1": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
}
"""What people call each family."""

# Width of the text states that a UNet's cross-attention reads.
_CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_CLIP_WIDTHS = {1024: "sd2"}

# By names that no other family has; the first that any module fits counts.
_NAMES: tuple[tuple[str, str], ...] = (
    ("flux2", r"transformer\.single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)$"),
    ("flux2", r"transformer\.transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)$"),
    ("flux2", r"transformer\.(double|single)_stream_modulation"),
    ("flux1", r"transformer\.single_transformer_blocks\."),
    ("qwen_image", r"transformer\.transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\."),
    ("qwen_image", r"transformer\.(img_in|txt_in)$"),
    ("z_image", r"transformer\.(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|adaLN)"),
    ("flux1", r"transformer\.transformer_blocks\.\d+\.(ff\.net|ff_context\.net|norm1)\b"),
    ("sdxl", r"text_encoder_2\.text_model\.|unet\.add_embedding\.|unet\.up_blocks\.0\.attentions\."),
    ("sdxl", r"unet\..*\.transformer_blocks\.(?:[2-9]|\d\d+)\."),
)  # fmt: skip
_SD3_WIDTHS = {1536, 2432}
_FLUX1_DOUBLE_BLOCKS = 19
_BLOCK = re.compile(r"transformer\.transformer_blocks\.(\d+)\.attn\.(to|add)_[qkv](_proj)?$")
_HIDDEN = {3072: "flux1", 4096: "flux2", 6144: "flux2"}

# What headers say: kohya's, OneTrainer's and ai-toolkit's ss_base_model_version, and ModelSpec's architectures.
_STATED = (
    ("sd15", r"sd_?v?1|sd_1|stable-diffusion-v1"),
    ("sd2", r"sd_?v?2|sd_2|stable-diffusion-v2"),
    ("sdxl", r"sdxl|stable-diffusion-xl|pony|illustrious|noobai"),
    ("sd3", r"sd_?3|stable-diffusion-3"),
    ("flux2", r"flux[-_.]?2"),
    ("flux1", r"flux"),
    ("qwen_image", r"qwen[-_]?image"),
    ("z_image", r"z[-_]?image"),
)
_STATING = ("ss_base_model_version", "modelspec.architecture")


class Family(NamedTuple):
    """A family and how it was told.

    Attributes:
        name: A key of `FAMILY_TITLES`, or None where nothing tells it.
        told_by: `shapes`, `modules` (which there are), `header`, or an empty text.
        contradiction: A sentence, where the header says another family; what the shapes say counts.
    """

    name: str | None
    told_by: str = ""
    contradiction: str | None = None


def family_of(updates: "AdapterUpdates", likely: str | None = None) -> str | None:
    """Return the family of an adapter's base; see `tell_family`."""
    return tell_family(updates, likely).name


def tell_family(updates: "AdapterUpdates", likely: str | None = None) -> Family:
    """Say which family of bases an adapter belongs to: by shapes, else by its modules, else by its header.

    Args:
        updates: The adapter.
        likely: What the way in which its file names modules suggests; it counts before the header.
    """
    if not any(name.startswith(("unet.", "transformer.", "text_encoder")) for name in updates.modules):
        return Family(None)
    stated = stated_family(updates.metadata)
    found = Family(_by_shapes(updates), "shapes")
    if found.name is None:
        found = Family(_by_modules(updates) or likely, "modules")
    if found.name is None:
        return Family(stated, "header" if stated else "")
    if stated is None or stated == found.name:
        return found
    key = next(key for key in _STATING if updates.metadata.get(key))
    return found._replace(
        contradiction=f"Its header says {key} {updates.metadata[key][:60]!r}, but its {found.told_by} are those of "
        f"{FAMILY_TITLES[found.name]}, which counts."
    )


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family that a file's header names, None if it names none that is known."""
    for key in _STATING:
        value = metadata.get(key, "").lower()
        for family, pattern in _STATED:
            if value and re.match(pattern, value):
                return family
    return None


def reference_of(base: "Base", otherwise: str | None = None) -> "BaseReference":
    """Return the record of a base, with its family and, of a pipeline, what its denoiser predicts.

    Args:
        base: The base.
        otherwise: What the adapter tells of its family; it counts for a pipeline whose class says nothing.
    """
    reference = base.reference()
    if base.pipeline is None:
        return reference
    return reference.with_fields(family=_of_base(base) or otherwise, **_of_scheduler(base))


def is_runnable(base: "Base") -> bool:
    """Say whether a base is a pipeline of a family that can be run and trained here."""
    return base.pipeline is not None and _of_base(base) is not None


def _of_base(base: "Base") -> str | None:
    from haori.bases.diffusion import family_of as family_of_base

    try:
        return family_of_base(base).name
    except BaseError:
        return None


def _of_scheduler(base: "Base") -> dict[str, Any]:
    from haori.bases.diffusion import prediction_of, read_configs

    try:
        scheduler = read_configs(base).part("scheduler").config
        prediction = prediction_of(scheduler)
    except BaseError:
        return {}
    if prediction == "flow":
        return {"prediction": prediction}
    return {"prediction": prediction, "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr"))}


def _by_shapes(updates: "AdapterUpdates") -> str | None:
    for name, update in updates.modules.items():
        shape = weight_shape(update) or ()
        if len(shape) < 2:
            continue
        if name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v")):
            if shape[1] in _CONTEXT_WIDTHS:
                return _CONTEXT_WIDTHS[shape[1]]
        elif _BLOCK.fullmatch(name) and shape[1] in _SD3_WIDTHS:
            return "sd3"
    return None


def _by_modules(updates: "AdapterUpdates") -> str | None:
    names = tuple(updates.modules)
    for family, pattern in _NAMES:
        expression = re.compile(pattern)
        if any(expression.match(name) for name in names):
            return family
    return _by_double_blocks(updates) or _by_unet_blocks(updates) or _by_clip_width(updates)


def _by_double_blocks(updates: "AdapterUpdates") -> str | None:
    """Tell FLUX and Qwen-Image apart where only attention of the blocks of two streams is changed."""
    blocks = {name: found for name in updates.modules if (found := _BLOCK.fullmatch(name))}
    if not blocks:
        return None
    if max(int(found[1]) for found in blocks.values()) >= _FLUX1_DOUBLE_BLOCKS:
        return "qwen_image"
    widths = {(weight_shape(updates.modules[name]) or (0,))[-1] for name in blocks}
    return next((_HIDDEN[width] for width in sorted(widths) if width in _HIDDEN), None)


def _by_unet_blocks(updates: "AdapterUpdates") -> str | None:
    if not _any(updates.modules, r"unet\.(down_blocks\.0\.attentions|up_blocks\.3)\."):
        return None  # SDXL has three resolutions, and no attention at the first
    for name, update in updates.modules.items():
        if re.fullmatch(r"unet\..*\.attentions\.\d+\.proj_(in|out)", name) and update.kind == "lora":
            return "sd15" if update.factors["A"].dim() == 4 else "sd2"
    return None


def _by_clip_width(updates: "AdapterUpdates") -> str | None:
    for name, update in updates.modules.items():
        if re.fullmatch(r"text_encoder\.text_model\..*\.(q_proj|k_proj|v_proj|fc1)", name):
            return _CLIP_WIDTHS.get((weight_shape(update) or (0,))[-1])
    return None


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in names)
