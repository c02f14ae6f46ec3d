"""The names that one served base answers to: its own, adapters of the library, those registered at run time, blends.

A name is resolved anew for each request, so a new, retrained, promoted or removed adapter takes effect with the next
one; a running request keeps the content ids that it was given.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import HaoriError, InputError, LibraryError, MismatchError
from haori.core.hashing import short
from haori.core.records import BaseReference, now
from haori.core.settings import settings
from haori.library import AdapterFiles, Library, adapter_id, check_base, check_name, inspect_adapter
from haori.library.adapter_names import check_no_base_name
from haori.library.cards import read_card
from haori.library.prompt_formats import check_template, joint_format, prompt_format, stored_template
from haori.library.searching.index import IndexRow
from haori.serve.adapters.blend import check_strength, parse_blend
from haori.serve.adapters.library_watch import LibraryWatch, View
from haori.serve.adapters.registered import Registered, RegisteredFile, folder_inside, registered_files, stamp_of
from haori.serve.request import BASE, AdapterMix

if TYPE_CHECKING:
    from haori.data import PromptFormat

__all__ = ["AdapterDirectory", "CheckAdapter", "ModelEntry", "Resolved"]

CheckAdapter = Callable[[AdapterFiles, str], None]
"""Refuses an adapter, given its files and its content id, that no request could be answered with."""

_FORMATS = 1000  # ways of speaking to adapters that are remembered


@dataclass(frozen=True)
class Resolved:
    """What a model name means now.

    Attributes:
        mix: Content ids and strengths; the same adapter in two places counts once, with the sum.
        label: The same with full names, such as `support@2` or `support@2:0.4+poet@1:0.6`.
        names: The name of each adapter asked for, without version; the base's for the base. Of an id, its first name.
        full_names: Of each adapter asked for, also at strength 0, every name that it has, in full; none for the base.
    """

    mix: AdapterMix
    label: str
    names: tuple[str, ...]
    full_names: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class ModelEntry:
    """One name that can be asked for.

    Attributes:
        id: The name.
        created_unix_s: When the adapter was made, or the server began, in seconds since 1970.
        root: Folder of the adapter; None for the base.
        parent: Name of the base; None for the base itself.
        adapter: Content id; None for the base.
    """

    id: str
    created_unix_s: int
    root: Path | None = None
    parent: str | None = None
    adapter: str | None = None


class _Meaning(NamedTuple):
    """The adapter that one part of a model name means."""

    adapter: str
    name: str
    full: str


class AdapterDirectory:
    """Names to adapters for one base; every method may be called from any thread.

    Args:
        library: Where the adapters are.
        base: The base that is served.
        base_names: What the base answers to, the first one being shown; names of adapters never hide one of these.
        roots: Folders that adapters may be registered from, besides the library.

    Raises:
        InputError: No name of the base was given.
    """

    def __init__(
        self, library: Library, base: BaseReference, *, base_names: Sequence[str], roots: Sequence[Path] = ()
    ) -> None:
        if not base_names:
            raise InputError("The base needs at least one name to be asked for by.")
        self.base = base
        self.base_names = tuple(dict.fromkeys(base_names))
        self._library = library
        self._roots = tuple(root.absolute() for root in roots)
        self._file = RegisteredFile(settings().home / "serving" / f"{base.id}.json")
        self._watch = LibraryWatch(library, self._file, self._roots)
        self._began = int(time.time())
        self._formats: dict[Path, PromptFormat] = {}
        self._listed: tuple[View | None, tuple[ModelEntry, ...]] = (None, ())

    def resolve(self, model: str) -> Resolved:
        """Say what a model name means now.

        Raises:
            InputError: It is no name, or a strength is out of bounds.
            LibraryError: There is no such adapter; near names are given.
            MismatchError: It was made for another base.
        """
        if model in self.base_names:
            return Resolved(BASE, self.base_names[0], (self.base_names[0],))
        view = self._view()
        strengths: dict[str, float] = {}
        found: dict[str, _Meaning] = {}
        names: dict[str, None] = {}
        for spec, strength in parse_blend(model):
            meaning = self._meaning(spec, view)
            found.setdefault(meaning.adapter, meaning)
            names[meaning.name] = None
            strengths[meaning.adapter] = strengths.get(meaning.adapter, 0.0) + strength
            check_strength(spec, strengths[meaning.adapter])
        mix = tuple(sorted((adapter, strength) for adapter, strength in strengths.items() if strength))
        if not mix:
            label = self.base_names[0]
        elif len(mix) == 1 and mix[0][1] == 1.0:
            label = found[mix[0][0]].full
        else:
            label = "+".join(f"{found[name].full}:{strengths[name]:g}" for name in found if strengths[name])
        return Resolved(mix, label, tuple(names), tuple(view.full_names[adapter] for adapter in found))

    def check_adapters(self, models: Iterable[str]) -> None:
        """Refuse names that mean no adapter now.

        Raises:
            InputError: One means the base alone, or is no name.
            LibraryError: There is no such adapter.
            MismatchError: It was made for another base.
        """
        for model in models:
            if not self.resolve(model).mix:
                raise InputError(f"{model!r} is the base without an adapter; give the name of an adapter.")

    def contents(self, models: Iterable[str]) -> frozenset[str]:
        """Return the content ids that names mean now; what means nothing (any more) is left out."""
        found: set[str] = set()
        for model in models:
            with suppress(HaoriError):
                found |= {adapter for adapter, _ in self.resolve(model).mix}
        return frozenset(found)

    def entries(self) -> tuple[ModelEntry, ...]:
        """Return every name that can be asked for: the base's, then each adapter's, bare and with every version."""
        view = self._view()
        listed, entries = self._listed
        if listed is not view:
            entries = self._entries_of(view)
            self._listed = view, entries
        return entries

    def hidden(self) -> tuple[str, ...]:
        """Return the names that mean the base here although adapters of it are called so too."""
        names, served = self._view().names, self.base.id
        return tuple(name for name in self.base_names if any(row.base == served for row in names.versions(name)))

    def folder(self, adapter: str) -> Path:
        """Return the folder of the adapter with this content id.

        Raises:
            LibraryError: It is not here, or not any more.
        """
        found = self._find(adapter)
        return self._library.folder(adapter) if found is None else found.folder

    def files(self, adapter: str) -> AdapterFiles:
        """Inspect the adapter with this content id, for the engine to read.

        Raises:
            LibraryError: It is not here, or not any more.
            FileFormatError: Its files are unusable, or were changed since it was registered.
        """
        found = self._find(adapter)
        if found is None:
            return inspect_adapter(self._library.folder(adapter))
        return registered_files(found, self._roots)

    def prompt_format(self, tokenizer: Any, mix: AdapterMix) -> "PromptFormat":
        """Return how the adapters of a mix are spoken to; the base, without any.

        Args:
            tokenizer: The base's.
            mix: Of a name that was resolved.

        Raises:
            LibraryError: An adapter is not here any more.
            MismatchError: One would be given other prompts than in training.
            InputError: They cannot be spoken to together.
        """
        from haori.data import PromptFormat

        if not mix:
            return PromptFormat(tokenizer)
        return joint_format([self._prompt_format(tokenizer, adapter) for adapter, _ in mix])

    def _prompt_format(self, tokenizer: Any, adapter: str) -> "PromptFormat":
        folder = self.folder(adapter)
        known = self._formats.get(folder)
        if known is None:
            while len(self._formats) >= _FORMATS:
                self._formats.pop(next(iter(self._formats)), None)
            known = self._formats[folder] = prompt_format(tokenizer, folder, read_card(folder))
        return known

    def register(self, name: str, folder: str | Path, check: CheckAdapter, *, replace: bool = False) -> None:
        """Give an adapter a name of its own, now and after a restart.

        Args:
            name: The name, without version.
            folder: A spec of the library, or a folder inside the roots.
            check: Of the engine that is to serve it.
            replace: Let a registered name mean this adapter from now on.

        Raises:
            LibraryError: There is no such adapter, or its folder is not one to load from.
            InputError: The name cannot be given, or is taken.
            FileFormatError: The files are unusable.
            MismatchError: It was made for another base, or does not fit.
            HaoriError: `check` refuses it.
        """
        view = self._view()
        if name in self.base_names:
            raise InputError(f"{name!r} is a name of the base; choose another.")
        try:
            check_no_base_name(check_name(name), self.base.name)
        except LibraryError as error:
            raise InputError(str(error)) from None
        if view.names.versions(name):
            raise InputError(f"{name!r} is a name in the library already; choose another, or promote a version of it.")
        entry, files = self._entry(str(folder), view)
        check_template(entry.folder, read_card(entry.folder), self.base.fingerprint.chat_template)
        check(files, entry.adapter)

        def add(held: Mapping[str, Registered]) -> Mapping[str, Registered]:
            if name in held and not replace:
                raise InputError(f"{name!r} is registered already; unload it first, or load it in place.")
            self._check_spoken_alike(name, entry, {other: given for other, given in held.items() if other != name})
            return {**held, name: entry}

        self._file.change(add)
        self._formats.pop(entry.folder, None)

    def unregister(self, name: str) -> None:
        """Take a registered name away. Requests under way are not concerned.

        Raises:
            LibraryError: It was not registered.
        """

        def without(held: Mapping[str, Registered]) -> Mapping[str, Registered]:
            if name not in held:
                where = " It is in the library; remove it there." if self._view().names.versions(name) else ""
                raise LibraryError(f"No adapter is registered as {name[:120]!r}.{where}")
            return {other: entry for other, entry in held.items() if other != name}

        self._file.change(without)

    def _check_spoken_alike(self, name: str, entry: Registered, held: Mapping[str, Registered]) -> None:
        """Refuse an adapter with the weights of another that is spoken to otherwise: by its id it is the same one."""
        folders = {other: given.folder for other, given in held.items() if given.adapter == entry.adapter}
        view = self._view()
        if entry.adapter in view.ids:
            folders[view.full_names[entry.adapter][0]] = self._library.folder(entry.adapter)
        for other, folder in folders.items():
            if folder != entry.folder and _speech_of(folder) != _speech_of(entry.folder):
                raise InputError(
                    f"{name!r} has the same weights as {other!r}, which is served already, and another chat template "
                    "or system message; unload that one first, or give both the same."
                )

    def _entries_of(self, view: View) -> tuple[ModelEntry, ...]:
        parent = self.base_names[0]
        entries = [ModelEntry(name, self._began) for name in self.base_names]
        for name, given in view.registered.items():
            if name in self.base_names:
                continue
            entries.append(ModelEntry(name, _unix_s(given.time), given.folder, parent, given.adapter))
        taken = {*self.base_names, *view.registered}
        for name in view.names.bare:
            rows = [] if name in taken else [(name, view.names.find(name))]
            rows += [(f"{name}@{row.version}", row) for row in view.names.versions(name)]
            for full, row in rows:
                if row.base == self.base.id:
                    folder = self._library.folder(row.adapter)
                    entries.append(ModelEntry(full, _unix_s(row.created), folder, parent, row.adapter))
        return tuple(entries)

    def _entry(self, given: str, view: View) -> tuple[Registered, AdapterFiles]:
        """Find an adapter that is to be registered, and describe it."""
        if "/" not in given and "\\" not in given:
            try:
                row = self._check_row(view.names.find(given))
            except LibraryError:
                if not self._roots:
                    raise
            else:
                folder = self._library.folder(row.adapter)
                entry = Registered(adapter=row.adapter, folder=folder, time=now(), stamp=None)
                return entry, inspect_adapter(folder)
        folder = folder_inside(given, self._roots)
        stamp = stamp_of(folder, self._roots)  # before the files are read: a later change must show
        files = inspect_adapter(folder)
        if (card := read_card(folder)) is not None:
            check_base(card, self.base)
        return Registered(adapter=adapter_id(files), folder=folder, time=now(), stamp=stamp), files

    def _meaning(self, spec: str, view: View) -> _Meaning:
        if spec in self.base_names:
            raise InputError(f"The base {spec!r} is part of every blend; leave it out.")
        if given := view.registered.get(spec):
            return _Meaning(given.adapter, spec, spec)
        row = self._check_row(view.names.find(spec))
        return _Meaning(row.adapter, row.name, f"{row.name}@{row.version}")

    def _check_row(self, row: IndexRow) -> IndexRow:
        """Return a row of an adapter that was made for the served base."""
        if row.base != self.base.id:
            card = read_card(self._library.folder(row.adapter))
            if card is not None:
                check_base(card, self.base)
            raise MismatchError(
                f"The adapter {row.name}@{row.version} was made for another base than {self.base.name!r}."
            )
        return row

    def _find(self, adapter: str) -> Registered | None:
        """Return the registered folder that an adapter is read from; None if that is the library's."""
        view = self._view()
        if adapter in view.ids:
            return None
        for entry in view.registered.values():
            if entry.adapter == adapter:
                return entry
        raise LibraryError(f"The adapter {short(adapter)!r} is not here, or not any more.")

    def _view(self) -> View:
        return self._watch.view()


def _speech_of(folder: Path) -> tuple[object, ...]:
    card = read_card(folder)
    return stored_template(folder), *((None, "text") if card is None else (card.system or None, card.control_tokens))


def _unix_s(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp())
