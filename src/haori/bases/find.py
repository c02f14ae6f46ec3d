"""Finds a base by name, catalogue name, path or hub id, and keeps the list of registered ones.

Bases that are part of Haori are always there, and their names are taken.

A name is looked up in that order, so a registered name always means the same base.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from haori.bases.base import Base, BaseEntry
from haori.bases.catalogue import CATALOGUE, install
from haori.bases.embedded import EMBEDDED
from haori.bases.gguf import convert_gguf, gguf_licence, is_gguf
from haori.bases.hub import fetch_from_hub, is_hub_id
from haori.bases.licence import licence_of_folder
from haori.bases.pipeline import PIPELINE_INDEX, read_base_folder
from haori.bases.registry import (
    MODEL,
    BaseRecord,
    check_name,
    home_of,
    read_record,
    register,
    registered_names,
    unregister,
    write_record,
)
from haori.core.errors import BaseError, HaoriError, nearest
from haori.core.hashing import hash_checkpoint_window, hash_file
from haori.core.records import CheckpointHashes
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.core.user_path import user_path

__all__ = ["add_base", "find_base", "list_bases", "remove_base", "show_base"]

# Pickled ones are named too, so that they are refused for what they are.
_CHECKPOINT = "checkpoint"
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class _Conversion:
    """How a file becomes a model folder.

    Attributes:
        kind: First part of the source of a base that was converted so.
        version: Raised when other files are written than before, so that cached ones are made again.
        convert: Writes the folder, from the file and with a label for the progress display.
        licence: What the file says.
    """

    kind: str
    version: int
    convert: Callable[[Path, Path, str], None]
    licence: Callable[[Path], str | None]


def find_base(spec: str, *, revision: str | None = None) -> Base:
    """Return the base that `spec` names, fetching or converting it on first use.

    Args:
        spec: A registered or catalogue name, that of an embedded base, a GGUF file, a single-file checkpoint of
            Stable Diffusion, a folder of a model or a pipeline, or a hub id `organisation/name`.
        revision: Branch, tag or commit of a hub model.

    Raises:
        BaseError: Nothing fits, or it cannot be fetched or used.
        FileFormatError: A file of it is truncated, malformed or unsafe.
        StorageError: The disk is full or not writable.
    """
    return _base(_resolve(spec, revision))


def add_base(spec: str, *, name: str | None = None, revision: str | None = None) -> Base:
    """Register a base under a name, so that it can be used by that name from anywhere.

    A catalogue entry is fetched, a GGUF file or a checkpoint converted; a folder stays where it is.

    Args:
        spec: As for `find_base`.
        name: The name to give it; by default the catalogue name, or the last part of the path or hub id.
        revision: Branch, tag or commit of a hub model.

    Raises:
        BaseError: As for `find_base`, or the name is taken or not allowed.
    """
    if _is_ours(spec) and name in (None, spec):
        return find_base(spec, revision=revision)
    path = user_path(spec)
    chosen = check_name(name or (path.stem if path.is_file() else path.resolve().name if path.exists() else path.name))
    if _is_ours(chosen):
        raise BaseError(f"The name {chosen!r} belongs to the catalogue; give another with --name.")
    existing = read_record(chosen)
    if path.is_file() and existing is None:
        return _base(_add_file(path, chosen))
    found = _resolve(spec, revision)
    if existing is not None:
        if existing.source == found.source and revision in (None, existing.revision):
            return _base(existing)
        raise BaseError(
            f"The name {chosen!r} already stands for {existing.source}; give another with --name, or run "
            f"`haori bases remove {chosen}` first."
        )
    record = found.with_fields(name=chosen, path=str(found.folder))
    base = _base(record)
    register(record)
    return base


def list_bases() -> list[BaseEntry]:
    """Return the registered and embedded bases and the catalogue entries that are not installed yet, by name."""
    entries = {name: _uninstalled(name) for name in CATALOGUE}
    entries.update({name: _entry(name) for name in (*EMBEDDED, *registered_names())})
    return [entries[name] for name in sorted(entries)]


def show_base(spec: str) -> tuple[BaseEntry, Base | None]:
    """Return what is known about a base without fetching a catalogue entry; the second part is None for one.

    Raises:
        BaseError: As for `find_base`.
    """
    if spec in CATALOGUE and read_record(spec) is None:
        return _uninstalled(spec), None
    base = find_base(spec)
    entry = BaseEntry(
        name=base.name,
        installed=True,
        source=base.source,
        licence=base.licence,
        parameters=base.parameters,
        size_bytes=base.size_bytes,
        path=base.path,
        description=_description(spec),
    )
    return entry, base


def remove_base(name: str) -> None:
    """Forget a registered base; files that were converted for it are deleted, a folder of yours is left alone.

    Raises:
        BaseError: No base of that name is registered.
    """
    names = list(registered_names())
    if name in names:
        unregister(name)
        return
    if name in EMBEDDED:
        raise BaseError(f"The base {name!r} is part of Haori and cannot be removed.")
    if name in CATALOGUE:
        raise BaseError(f"The base {name!r} is not installed, so there is nothing to remove.")
    hint = nearest(name, names) or (f"registered are {', '.join(names)}." if names else "none is registered.")
    raise BaseError(f"No base is registered as {name!r}; {hint}")


def _resolve(spec: str, revision: str | None) -> BaseRecord:
    record = _record(spec)
    if record is not None and record.source.startswith("hub:"):
        return _from_registered_hub(record, revision)
    if not spec.strip():
        raise BaseError(_unknown(spec))
    path = user_path(spec)
    is_hub = record is None and not _is_ours(spec) and not path.exists() and is_hub_id(spec)
    if revision is not None and not is_hub:
        raise BaseError(f"The revision {revision!r} only applies to hub models, and {spec!r} is not one; leave it out.")
    if record is not None:
        return record
    if spec in CATALOGUE:
        return install(CATALOGUE[spec])
    if path.is_file():
        return _converted(path)
    if path.is_dir():
        folder = path.resolve()
        return BaseRecord(name=folder.name, source=f"folder:{folder}", path=str(folder))
    if is_hub:
        folder, commit = fetch_from_hub(spec, revision)
        return BaseRecord(name=spec, source=f"hub:{spec}", path=str(folder), revision=commit)
    raise BaseError(_unknown(spec))


def _record(name: str) -> BaseRecord | None:
    """Return the record of an embedded or registered base, or None."""
    embedded = EMBEDDED.get(name)
    if embedded is None:
        return read_record(name)
    return BaseRecord(name=name, source=embedded.source, path=str(embedded.folder), licence=embedded.licence)


def _is_ours(name: str) -> bool:
    """Whether Haori gives this name itself, so that no other base can be registered under it."""
    return name in CATALOGUE or name in EMBEDDED


def _description(name: str) -> str | None:
    known = EMBEDDED.get(name) or CATALOGUE.get(name)
    return None if known is None else known.description


def _from_registered_hub(record: BaseRecord, revision: str | None) -> BaseRecord:
    """Use the commit that was registered, fetched again if the hub's cache was emptied."""
    if revision in (None, record.revision) and record.folder.is_dir():
        return record
    folder, commit = fetch_from_hub(record.source.removeprefix("hub:"), revision or record.revision)
    return record.with_fields(path=str(folder), revision=commit)


def _converted(path: Path) -> BaseRecord:
    """Return the converted copy of a file from the cache, made on first use and found by content."""
    how, file = _conversion(path), path.resolve()
    digits = hash_file(file).removeprefix("sha256:")[:32]
    home = settings().cache / how.kind / f"{digits}-{how.version}"
    if not any((home / index).is_file() for index in ("config.json", PIPELINE_INDEX)):
        with staged_folder(home) as stage:
            how.convert(file, stage, file.stem)
    record = _file_record(file.stem, file, how)
    return record.with_fields(path=str(home))


def _add_file(path: Path, name: str) -> BaseRecord:
    how, file = _conversion(path), path.resolve()
    record = _file_record(name, file, how)
    with staged_folder(home_of(name)) as stage:
        (stage / MODEL).mkdir()
        how.convert(file, stage / MODEL, name)
        write_record(record, stage)
    return record


def _file_record(name: str, file: Path, how: _Conversion) -> BaseRecord:
    hashes = None
    if how.kind == _CHECKPOINT:
        sha256 = hash_file(file).removeprefix("sha256:")
        hashes = CheckpointHashes(sha256=sha256, autov1=hash_checkpoint_window(file))
    return BaseRecord(name=name, source=f"{how.kind}:{file}", licence=how.licence(file), checkpoint=hashes)


def _conversion(path: Path) -> _Conversion:
    """Return how a file is converted.

    Raises:
        BaseError: It is neither GGUF nor a checkpoint.
    """
    if is_gguf(path):
        return _Conversion("gguf", 1, convert_gguf, gguf_licence)
    if path.suffix in _CHECKPOINTS:
        from haori.bases.diffusion.single_file import convert_checkpoint, read_checkpoint

        read_checkpoint(path)
        return _Conversion(_CHECKPOINT, 1, convert_checkpoint, lambda file: read_checkpoint(file).licence)
    parent = "; name its folder instead" if (path.parent / "config.json").is_file() else ""
    raise BaseError(
        f"{str(path)!r} is a file but neither GGUF nor a checkpoint (.safetensors){parent}. A base is a folder, a GGUF "
        "file or a checkpoint."
    )


def _base(record: BaseRecord) -> Base:
    folder = record.folder
    if not folder.is_dir():
        raise BaseError(
            f"The base {record.name!r} was registered from {str(folder)!r}, which is gone; put it back, or run "
            f"`haori bases remove {record.name}` and add it again."
        )
    facts = read_base_folder(folder)
    return Base(
        name=record.name,
        path=folder,
        source=record.source,
        revision=record.revision,
        components=facts.components(),
        licence=record.licence or licence_of_folder(folder),
        pipeline=facts.pipeline,
        checkpoint=record.checkpoint,
    )


def _uninstalled(name: str) -> BaseEntry:
    entry = CATALOGUE[name]
    return BaseEntry(
        name=name,
        installed=False,
        source=entry.source,
        licence=entry.licence,
        parameters=entry.parameters,
        size_bytes=entry.size_bytes,
        path=None,
        description=entry.description,
    )


def _entry(name: str) -> BaseEntry:
    """Describe a registered base from its record and headers; say what is wrong where it cannot be read."""
    blank = BaseEntry(name, True, "unknown", None, None, None, None)
    try:
        record = _record(name)
        if record is None:
            return blank
        blank = replace(
            blank,
            source=record.source,
            licence=record.licence,
            path=record.folder,
            description=_description(name),
        )
        if not record.folder.is_dir():
            return replace(blank, problem=f"{str(record.folder)!r} is gone")
        facts = read_base_folder(record.folder)
    except HaoriError as error:
        return replace(blank, problem=str(error))
    licence = record.licence or licence_of_folder(record.folder)
    return replace(blank, licence=licence, parameters=facts.parameters, size_bytes=facts.size_bytes)


def _unknown(spec: str) -> str:
    if spec.startswith((".", "~", "/")) or spec.count("/") > 1 or spec.endswith((".gguf", *_CHECKPOINTS)):
        return f"There is no folder or file {spec!r}; check the path."
    known = sorted({*CATALOGUE, *EMBEDDED, *registered_names()})
    hint = nearest(spec, known) or f"known are {', '.join(known)}."
    return (
        f"There is no base {spec!r}; {hint} A base may also be a folder, a GGUF file, a checkpoint "
        "(.safetensors), or a hub id such as 'organisation/name'."
    )
