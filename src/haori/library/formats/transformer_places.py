"""Finds where the modules of an image transformer's adapter belong, whichever naming its file uses, and the way back.

A file's transformer is of one family. Fused modules become those that diffusers has
in their place, each with its rows of the update.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from haori.core.errors import FileFormatError, InputError
from haori.library.formats.bfl_names import FLUX1, FLUX1_SHAPES, FLUX2
from haori.library.formats.block_map import BlockMap, Place
from haori.library.formats.fused_rows import Part, split_rows, stack_rows, swap_halves
from haori.library.formats.tensor_names import place_modules
from haori.library.formats.transformer_names import QWEN_IMAGE, Z_IMAGE
from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from haori.library.formats.format import Source
    from haori.library.updates import ModuleUpdate

__all__ = ["ALL_NAMES", "DIFFUSERS_NAMES", "OWN_NAMES", "Joint", "families_told", "fuse_modules", "place_fused"]

Joint = Literal[".", "_"]

OWN_NAMES: Mapping[str, BlockMap] = {"flux1": FLUX1, "flux2": FLUX2, "z_image": Z_IMAGE, "qwen_image": QWEN_IMAGE}
"""The naming of each family's own code, which ComfyUI and kohya's scripts keep."""

DIFFUSERS_NAMES: Mapping[str, BlockMap] = {family: own.diffusers() for family, own in OWN_NAMES.items()}
"""The naming of diffusers."""

ALL_NAMES: Mapping[str, BlockMap] = {family: own.and_diffusers() for family, own in OWN_NAMES.items()}
"""Both: files of ai-toolkit and others have either behind ComfyUI's prefix."""


def families_told(modules: "Mapping[str, ModuleUpdate]", joint: Joint, maps: Mapping[str, BlockMap]) -> tuple[str, ...]:
    """Return the families whose naming knows most of a file's module names; none if no naming knows any.

    There are several where only attention is adapted, whose modules have the same names in them.

    Args:
        modules: The updates of the transformer by the file's own names, without prefix.
        joint: What joins the parts of these names.
        maps: The naming of each family.
    """
    known = {
        family: sum(names.place_of(name, joint) is not None for name in modules)
        for family, names in maps.items()
        if not (family == "flux1" and _contradicts_flux1(modules, joint))
    }
    most = max(known.values(), default=0)
    return tuple(family for family, count in known.items() if count == most and count)


def place_fused(
    source: "Source",
    modules: "Mapping[str, ModuleUpdate]",
    place_of: Callable[[str], Place | None],
) -> "dict[str, ModuleUpdate]":
    """Give each update the neutral name of its module, after splitting those of fused modules.

    Args:
        source: The file they are from, for messages.
        modules: Updates by the file's own names.
        place_of: Returns the neutral modules for the file's own name, or None if the format knows no such module.

    Raises:
        FileFormatError: A module is not known, two of them are the same, or a fused one cannot be split.
    """
    names: dict[str, str] = {}
    parts: dict[str, ModuleUpdate] = {}
    for own, update in modules.items():
        place = place_of(own)
        if place is None:
            parts[own] = update
            continue
        try:
            split = _split(update, place, modules, place_of)
        except InputError as error:
            raise FileFormatError(
                f"{str(source.path)!r} cannot be read as an adapter: {own[:120]!r} is fused, and {error}"
            ) from None
        for module, part in zip(place.modules, split, strict=True):
            if part is None:
                continue
            label = own if len(split) == 1 else f"{own} ({module.rpartition('.')[2]})"
            names[label], parts[label] = module, part
    return place_modules(source, parts, names.get)


def fuse_modules(modules: "Mapping[str, ModuleUpdate]", names: BlockMap, title: str) -> "dict[str, ModuleUpdate]":
    """Return updates by the dotted names of another naming, those of fused modules put together.

    Args:
        modules: The updates by diffusers' names, without component.
        names: The other naming.
        title: What its format is called, for messages.

    Raises:
        InputError: It has no such module, or no update of one kind expresses those of a fused one.
    """
    groups: dict[str, Place] = {}
    for module in modules:
        own = names.own_name(module)
        place = None if own is None else names.place_of(own)
        if own is None or place is None:
            raise InputError(f"{title} has no name for the module {module!r}, so the adapter cannot be written in it.")
        groups[own] = place
    fused = {}
    for own, place in groups.items():
        try:
            fused[own] = _fuse(modules, place)
        except InputError as error:
            raise InputError(f"{own!r} cannot be written for {title}: {error}") from None
    return fused


def _contradicts_flux1(modules: "Mapping[str, ModuleUpdate]", joint: Joint) -> bool:
    """Say whether a module that both versions of Flux name alike has a shape that Flux.1 does not have."""
    for name, update in modules.items():
        place, shape = FLUX1.place_of(name, joint), weight_shape(update)
        own = FLUX1.own_name(place.modules[0]) if place is not None else None
        ratio = FLUX1_SHAPES.get(own.split(".", 2)[-1]) if own is not None else None
        if ratio is not None and shape is not None and shape[0] * ratio[1] != shape[1] * ratio[0]:
            return True
    return False


def _split(
    update: "ModuleUpdate",
    place: Place,
    modules: "Mapping[str, ModuleUpdate]",
    place_of: Callable[[str], Place | None],
) -> "Sequence[ModuleUpdate | None]":
    if place.rows == "swapped":
        return [swap_halves(update)]
    if place.rows == "whole":
        return [update]
    shape = weight_shape(update) or (None if update.bias is None else (update.bias.shape[0],))
    assert shape is not None  # there is a weight's update or a bias's
    rows, count = shape[0], len(place.modules)
    if place.rows == "equal":
        if rows % count:
            raise InputError(f"its {rows} rows are not those of {count} modules of one size.")
        return split_rows(update, [rows // count] * count)
    hidden = shape[1] if len(shape) > 1 else _hidden_size(modules, place_of)
    if hidden is None or rows <= hidden * (count - 1):
        raise InputError(f"its {rows} rows are not {count - 1} times the hidden size {hidden} and those of an MLP.")
    return split_rows(update, [*[hidden] * (count - 1), rows - hidden * (count - 1)])


def _hidden_size(modules: "Mapping[str, ModuleUpdate]", place_of: Callable[[str], Place | None]) -> int | None:
    """Return the hidden size as other fused modules of the file tell it by their inputs."""
    for own, update in modules.items():
        place, shape = place_of(own), weight_shape(update)
        if place is not None and len(place.modules) > 1 and shape is not None and len(shape) > 1:
            return shape[1]
    return None


def _fuse(modules: "Mapping[str, ModuleUpdate]", place: Place) -> "ModuleUpdate":
    updates = [modules.get(module) for module in place.modules]
    if place.rows in {"whole", "swapped"}:
        only = updates[0]
        assert only is not None
        return swap_halves(only) if place.rows == "swapped" else only
    sizes = [None if update is None else _rows_of(update) for update in updates]
    inputs = next((shape[1] for update in updates if update and len(shape := weight_shape(update) or ()) > 1), None)
    known = next((size for size in sizes[: len(sizes) - (place.rows == "hidden_and_rest")] if size), inputs)
    rest = known if known is None or place.rows == "equal" else known * FLUX1_SHAPES["img_mlp.0"][0]
    parts = []
    for number, (size, update) in enumerate(zip(sizes, updates, strict=True)):
        rows = size or (rest if number == len(sizes) - 1 else known)
        if rows is None:
            raise InputError("only biases of some of its parts are changed, which do not tell how many rows it has.")
        parts.append(Part(rows, update))
    return stack_rows(parts)


def _rows_of(update: "ModuleUpdate") -> int:
    shape = weight_shape(update)
    if shape is not None:
        return shape[0]
    assert update.bias is not None
    return int(update.bias.shape[0])
