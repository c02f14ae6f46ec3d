"""One safetensors file whose keys are a prefix for each component, a module's name in some naming, and a factor's name.

What differs between the formats of image adapters that are such files is data: the prefixes, what joins the parts of a
name, and whose names the modules have. `NamedFile` is such a format.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from haori.core.errors import InputError
from haori.library.families import family_of, stated_family
from haori.library.formats.block_map import BlockMap, Place
from haori.library.formats.bundled_words import is_bundled, refuse_words
from haori.library.formats.format import Source
from haori.library.formats.kohya_factors import kohya_tensors
from haori.library.formats.kohya_metadata import kohya_metadata
from haori.library.formats.lycoris_scales import with_rank_stabilised_scales
from haori.library.formats.safetensors_writing import write_hashed
from haori.library.formats.tensor_names import read_modules, split_key
from haori.library.formats.transformer_names import t5_module
from haori.library.formats.transformer_places import DIFFUSERS_NAMES, Joint, families_told, fuse_modules, place_fused
from haori.library.formats.unet_names import clip_module, sgm_name, unet_module
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard

__all__ = ["NamedFile", "Slot"]

_IMAGE = {"transformer", "image"}
_UNET = re.compile(
    r"(input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks|time_embed|label_emb|out|conv_in)\."
)


class Slot(NamedTuple):
    """What a prefix stands for: a component of the base, and what its modules are called.

    `image` is a transformer or a UNet, told by the names.
    """

    component: str
    naming: Literal["transformer", "image", "clip", "t5", "clip or t5"]


@dataclass(frozen=True)
class NamedFile:
    """A format of such files.

    Attributes:
        name: What a command and a card call it.
        title: What it is, for tables and messages.
        prefixes: What each prefix stands for. A module has the longest that fits.
        maps: The names of the transformer's modules, by family.
        joint: What joins the parts of a name.
        respell: Gives a key the factor's name that other formats have.
        written: The names that files are written with, by family; none if it is only read.
        shared: Prefixes that files of diffusers have too; behind them, its names do not tell the format.
        bundles_words: Whether the programs that read it find new words in it.
    """

    name: str
    title: str
    prefixes: Mapping[str, Slot]
    maps: Mapping[str, BlockMap]
    joint: Joint = "."
    respell: Callable[[str], str] = field(default=str)
    written: Mapping[str, BlockMap] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    bundles_words: bool = True

    def detect(self, source: Source) -> bool:
        """Say whether a module has one of the prefixes and, behind it, a name that is known.

        CLIP's modules behind a prefix of kohya's tell nothing: they are in files of several formats.
        """
        keys = (self.respell(key) for key in source.tensors if key.startswith(self._starts))
        found = {split[0] for key in keys if (split := split_key(key)) is not None}
        return any(self._is_telling(module) for module in found)

    def read(self, source: Source) -> AdapterUpdates:
        """Read the file into the neutral form.

        Raises:
            FileFormatError: A key is of no known module or method, or tensors do not fit together.
        """
        named = read_modules(source, self.respell)
        modules = with_rank_stabilised_scales(named.modules, source.metadata)  # before a split makes ranks others
        told = families_told(self._image_modules(modules), self.joint, self.maps)
        stated = stated_family(source.metadata)
        family = stated if stated in told else next(iter(told), None)
        updates = AdapterUpdates(
            place_fused(source, modules, lambda own: self._place(own, family)),
            source.metadata,
            self.name,
            extra=named.extra,
        )
        # Attention alone: both versions of Flux have one name for it, and all families share those of diffusers.
        is_sure = family == stated or len(told) == 1 or set(told) == {"flux1", "flux2"}
        return replace(updates, family=family_of(updates, family if is_sure else None))

    def write(
        self,
        updates: AdapterUpdates,
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a safetensors file with kohya's metadata and hashes; modules that are one there are put together.

        Raises:
            InputError: The format is only read, or has no way to say what the adapter changes.
        """
        if not self.written:
            raise InputError(f"Adapters are read from {self.title}, not written; write kohya, comfyui or diffusers.")
        if not self.bundles_words:
            refuse_words(updates.extra, self.title)
        if others := sorted(key for key in updates.extra if not is_bundled(key)):
            raise InputError(
                f"{self.title} has no place for the tensor {others[0]!r}, which the adapter has beside LoRA."
            )
        family = updates.family or family_of(updates)
        tensors: dict[str, Tensor] = dict(updates.extra)
        for own, update in self._own_modules(updates, family).items():
            tensors |= {f"{own}.{end}": tensor for end, tensor in kohya_tensors(update).items()}
        write_hashed(path, tensors, kohya_metadata(updates, family, card, path.stem))

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        """Return what keys that could tell the format begin with: most files are told from others by that alone."""
        words = {word for names in self.maps.values() for word in names.first_words}
        found: set[str] = set()
        for prefix, slot in self.prefixes.items():
            found |= {prefix + word for word in words} if slot.naming in _IMAGE else {prefix}
            found |= {prefix} if slot.naming == "image" and prefix else set()
        return tuple(sorted(found))

    def _split(self, module: str) -> tuple[Slot, str] | None:
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            if module.startswith(prefix):
                return self.prefixes[prefix], module.removeprefix(prefix)
        return None

    def _image_modules(self, modules: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
        split = {module: self._split(module) for module in modules}
        return {found[1]: modules[own] for own, found in split.items() if found and found[0].naming in _IMAGE}

    def _is_telling(self, module: str) -> bool:
        if (split := self._split(module)) is None:
            return False
        slot, name = split
        if slot.naming not in _IMAGE:
            place = _text_place(slot, name)
            return place is not None and (not module.startswith("lora_te") or t5_module(name) is not None)
        of_diffusers = unet_module(name) == name or any(names.place_of(name) for names in DIFFUSERS_NAMES.values())
        if module.removesuffix(name) in self.shared and of_diffusers:
            return False
        return any(_image_place(slot, name, names, self.joint) is not None for names in self.maps.values())

    def _place(self, module: str, family: str | None) -> Place | None:
        """Return where a module of a file for this family belongs."""
        if (split := self._split(module)) is None:
            return None
        slot, name = split
        if slot.naming in _IMAGE:
            return _image_place(slot, name, self.maps.get(family or ""), self.joint)
        return _text_place(slot, name)

    def _own_modules(self, updates: AdapterUpdates, family: str | None) -> dict[str, ModuleUpdate]:
        """Return the updates by the names that the file has for their modules."""
        found: dict[str, ModuleUpdate] = {}
        transformer: dict[str, ModuleUpdate] = {}
        for module, update in updates.modules.items():
            component, _, path = module.partition(".")
            if component == "transformer":
                transformer[path] = update
                continue
            own = sgm_name(path) if component == "unet" else path
            prefix = self._prefix(component, path)
            if own is None or prefix is None:
                raise InputError(f"{self.title} has no name for the module {module!r}; write the adapter as diffusers.")
            found[prefix + own.replace(".", self.joint)] = update
        if transformer:
            if family is None or family not in self.written:
                raise InputError(
                    f"Which base the adapter is for is not told by its modules ({family or 'none'} is not among "
                    f"{', '.join(self.written)}), so {self.title} cannot be written; write it as diffusers."
                )
            prefix = self._prefix("transformer", "")
            fused = fuse_modules(transformer, self.written[family], self.title)
            found |= {f"{prefix}{own.replace('.', self.joint)}": update for own, update in fused.items()}
        return found

    def _prefix(self, component: str, path: str) -> str | None:
        """Return the first prefix of a component that is for such a name."""
        naming = "t5" if t5_module(path) == path else "clip" if clip_module(path) == path else None
        for prefix, slot in self.prefixes.items():
            if component == slot.component == "transformer" or (component == "unet" and slot.naming == "image"):
                return prefix
            if slot.component == component and naming is not None and naming in slot.naming:
                return prefix
        return None


def _image_place(slot: Slot, name: str, names: BlockMap | None, joint: Joint) -> Place | None:
    if slot.naming == "image" and _UNET.match(name):
        found = unet_module(name)
        return None if found is None else Place((f"unet.{found}",))
    place = None if names is None else names.place_of(name, joint)
    return None if place is None else place.inside(slot.component)


def _text_place(slot: Slot, name: str) -> Place | None:
    found = t5_module(name) if "t5" in slot.naming else None
    if found is None and "clip" in slot.naming:
        found = clip_module(name)
    return None if found is None else Place((f"{slot.component}.{found}",))
