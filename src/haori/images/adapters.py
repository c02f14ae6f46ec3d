"""An adapter for pictures as it acts on one base: each update by the name of the live module that it changes.

Every format of the library is read. A key of the file is used, or named in an error or in the adapter's notes; an
adapter that has no place in the base is refused.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import MismatchError
from haori.core.hashing import hash_data, hash_file
from haori.library.families import FAMILY_TITLES, tell_family
from haori.library.file_hashes import hash_weight_file
from haori.library.fit import live_weights, match
from haori.library.formats.peft_components import installed_name
from haori.library.formats.registry import read_updates
from haori.library.mounts.described import UNKNOWN
from haori.library.store import Library, StoredAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.bases import Base
    from haori.library.mounts.mounts import Scan
    from haori.library.searching.entries import Entry
    from haori.library.updates import AdapterUpdates, ModuleUpdate

__all__ = ["PictureAdapter", "PictureAdapters", "read_picture_adapter"]

_LONGEST_NAMED = 3
_SHORT = 12  # digits of a hash in infotext
_CAPACITY_BYTES = 2 << 30
_TASKS = frozenset({"text_to_image", "image"})


@dataclass(frozen=True, eq=False)
class PictureAdapter:
    """What an adapter does to the components of a pipeline.

    Attributes:
        name: What it was asked for by.
        path: Its file or folder.
        content_hash: Of its bytes, as `sha256:<hex>`.
        short_hash: The 12 digits that infotext shows (AutoV3 of a safetensors file).
        updates: By component and name of the live module, as in `unet.mid_block.attentions.0.proj_in`.
        size_bytes: Of the tensors.
        notes: What of the file is not used here, and what else its user should know; a sentence each.
    """

    name: str
    path: Path
    content_hash: str
    short_hash: str
    updates: "Mapping[str, ModuleUpdate]"
    size_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components that it changes."""
        return tuple(sorted({name.partition(".")[0] for name in self.updates}))


def read_picture_adapter(
    path: Path,
    components: "Mapping[str, nn.Module]",
    *,
    base: str,
    name: str | None = None,
    content_hash: str | None = None,
) -> PictureAdapter:
    """Read an adapter of any format for the components of a pipeline.

    Args:
        path: A safetensors or GGUF file, a PEFT folder, a folder of a PEFT folder a component, or an adapter's folder
            in the library.
        components: The denoiser and the text encoders by name, loaded or as skeletons without weights.
        base: What messages call the base.
        name: What the adapter is called; by default its file's stem.
        content_hash: Of its bytes, where it is known already.

    Raises:
        FileFormatError: It is damaged, of no known format, or holds a key whose meaning is not known.
        MismatchError: A module that it changes is not in the base or has another shape there, or it changes none.
    """
    called = name or path.stem
    updates = read_updates(path)
    placed = _placed(updates, components, called, base)
    size = sum(tensor.nbytes for update in placed.values() for tensor in _tensors(update))
    content, short = _hashes(path)
    return PictureAdapter(called, path, content_hash or content, short, placed, size, _notes(updates))


class PictureAdapters:
    """The adapters of a library and of its mounted folders for one base, found by name and kept while they are used.

    What is kept is known by its content: a file that was replaced under its name is read again.

    Args:
        components: The denoiser and the text encoders of the base by name, loaded or as skeletons.
        base: The base they are of.
        library: By default that of this machine.
        capacity_bytes: Most bytes of tensors that are kept; those used longest ago go first.
    """

    def __init__(
        self,
        components: "Mapping[str, nn.Module]",
        base: "Base",
        *,
        library: Library | None = None,
        capacity_bytes: int = _CAPACITY_BYTES,
    ) -> None:
        self.base = base
        self.library = library or Library()
        self.capacity_bytes = capacity_bytes
        self._components = dict(components)
        self._kept: OrderedDict[str, PictureAdapter] = OrderedDict()
        self._outside: dict[str, Path] = {}

    def name(self, path: Path, name: str) -> None:
        """Give a name to an adapter outside of the library; it goes before those of the library."""
        self._outside[name] = path

    def get(self, name: str) -> PictureAdapter:
        """Return an adapter by its name.

        Args:
            name: `smile` or `smile@2` of the library; `folder/name` of a mounted tree, a file's stem, the name that
                its trainer gave it (`ss_output_name`), or digits of a hash.

        Raises:
            LibraryError: Nothing is called so, several are, or the mounted folder is gone.
            FileFormatError: It is damaged.
            MismatchError: It has no place in the base.
        """
        if name in self._outside:
            return self.read(self._outside[name], name)
        stored = self.library.get(name)
        return self._read(stored.path, name, stored.card.id, self._notes_on_base(stored))

    def read(self, path: Path, name: str | None = None) -> PictureAdapter:
        """Return an adapter that lies at a path, such as one of a training run.

        Raises:
            FileFormatError: It is damaged, or there is none.
            MismatchError: It has no place in the base.
        """
        return self._read(path, name or path.stem, _hashes(path)[0], ())

    def entries(self) -> "tuple[Entry, ...]":
        """Return what the library and its mounted folders hold for pictures, without opening a file."""
        listed = (one.entry for one in self.library.search().listed)
        return tuple(entry for entry in listed if entry.task in _TASKS or (entry.mount and entry.task == UNKNOWN))

    def refresh(self) -> "tuple[Scan, ...]":
        """Look for new, changed and deleted files in the mounted folders."""
        return self.library.mounts.rescan()

    def _read(self, path: Path, name: str, content_hash: str, notes: tuple[str, ...]) -> PictureAdapter:
        found = self._kept.get(content_hash)
        if found is None:
            found = read_picture_adapter(
                path, self._components, base=self.base.name, name=name, content_hash=content_hash
            )
            self._kept[content_hash] = found
        self._kept.move_to_end(content_hash)
        while len(self._kept) > 1 and sum(one.size_bytes for one in self._kept.values()) > self.capacity_bytes:
            self._kept.popitem(last=False)
        if (found.name, found.path) == (name, path) and not notes:
            return found
        return replace(found, name=name, path=path, notes=(*found.notes, *notes))

    def _notes_on_base(self, stored: StoredAdapter) -> tuple[str, ...]:
        card = stored.card
        if not card.base.components:
            return ()
        found = card.base.compare(self.base.reference(), card.components)
        if "other weights" not in found.values():
            return ()
        return (
            f"{stored.name} was made on {card.base.name!r}; {self.base.name!r} has the same structure and other "
            "weights, so what it does is not what was measured.",
        )


def _placed(
    updates: "AdapterUpdates", components: "Mapping[str, nn.Module]", called: str, base: str
) -> "dict[str, ModuleUpdate]":
    fit = match(updates, live_weights(components))
    if not fit.is_whole:
        family = tell_family(updates)
        if fit.misfits and family.name is not None:
            told = f"{FAMILY_TITLES[family.name]}, as its {family.told_by} tell"
            try:
                fit.require(called, base)
            except MismatchError as error:
                raise MismatchError(f"{error} It is for {told}.") from None
        fit.require(called, base)
    placed = {}
    for name, update in updates.modules.items():
        component, _, path = name.partition(".")
        live = installed_name(type(components[component]).__name__, path)
        placed[f"{component}.{live}"] = _owned(update)
    return placed


def _owned(update: "ModuleUpdate") -> "ModuleUpdate":
    """Return an update that keeps no file open: who writes over it must change nothing here."""
    return replace(
        update,
        factors={name: factor.clone() for name, factor in update.factors.items()},
        magnitude=None if update.magnitude is None else update.magnitude.clone(),
        bias=None if update.bias is None else update.bias.clone(),
    )


def _tensors(update: "ModuleUpdate") -> "list[Tensor]":
    return [*update.factors.values(), *(one for one in (update.magnitude, update.bias) if one is not None)]


def _notes(updates: "AdapterUpdates") -> tuple[str, ...]:
    if not updates.extra:
        return ()
    named = ", ".join(repr(key[:80]) for key in sorted(updates.extra)[:_LONGEST_NAMED])
    more = f" and {len(updates.extra) - _LONGEST_NAMED} more" if len(updates.extra) > _LONGEST_NAMED else ""
    return (f"Of its file {named}{more} change no weight of the base and are not used.",)


def _hashes(path: Path) -> tuple[str, str]:
    """Return the hash of the content, and the digits that infotext shows."""
    from haori.library.formats.format import open_source

    file = open_source(path).path
    if file.is_file():
        found = hash_weight_file(file)
        return f"sha256:{found.sha256}", (found.autov3 or found.sha256)[:_SHORT]
    files = sorted(one for one in file.rglob("*") if one.is_file() and one.suffix in {".safetensors", ".json"})
    digest = hash_data([[str(one.relative_to(file)), hash_file(one)] for one in files])
    return digest, digest.removeprefix("sha256:")[:_SHORT]
