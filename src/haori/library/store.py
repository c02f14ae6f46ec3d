"""The library on disk: one adapter is one folder, named by its content, with a card that names it for people.

    <root>/adapters/<first 2 hex>/<64 hex>/   stock PEFT files and card.json
    <root>/promoted.json                      which version a bare name means, where one was promoted
    <root>/index.sqlite                       made again from the cards when missing, damaged or out of step
    <root>/.lock  <root>/.changing            held during a change; there during a change

The cards are the truth. Writers hold one lock for the whole of a change and every change is one rename, so a process
killed at any instant leaves the old state or the new one. What it left half-made begins with a dot and is never
looked at (`rebuild` deletes it), and the mark it left behind tells the next reader to make the index again. Names
carry versions: the next one is one above the highest in use.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from haori.core.errors import LibraryError
from haori.core.folder_swap import delete_folder
from haori.core.records import AdapterCard
from haori.core.settings import settings
from haori.core.storage import explain_os_errors, staged_folder, sweep, write_text
from haori.data.seen import SEEN_NAME
from haori.library.adapter_names import check_no_base_name, refuse_base_name
from haori.library.cards import CARD_NAME, adapter_id, draft_card, id_on_base, read_card
from haori.library.contents import content_id, copy_contents
from haori.library.formats.peft import export_peft
from haori.library.mounts.mounts import MountedFile, Mounts
from haori.library.promotion import PROMOTIONS_NAME, History, PromotionFile, promote, roll_back
from haori.library.searching.index import Index, IndexRow, Rebuilt
from haori.library.searching.search import Search, search
from haori.library.specs import Names, id_digits
from haori.library.stored_cards import stored_folder

__all__ = ["Library", "Rebuilt", "StoredAdapter", "adapter_id", "check_name", "draft_card"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What Windows takes for a device, whatever follows behind a dot.
_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
_FIXED = frozenset({"id", "names", "base", "schema_version"})


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the library.

    Attributes:
        path: Its folder: stock PEFT files and the card. Of a mounted adapter, the file.
        card: What is known about it.
        name: The name with version that it was found or stored under, e.g. `support@2`.
        promoted: Since when the bare name means this version because it was promoted, as ISO 8601; else None.
        mounted: What is known of it as a file of a mounted tree; None for a stored one.
    """

    path: Path
    card: AdapterCard
    name: str
    promoted: str | None = None
    mounted: MountedFile | None = None


def check_name(name: str) -> str:
    """Return `name` if an adapter may be called so.

    Raises:
        LibraryError: It may not.
    """
    if not _NAME.fullmatch(name) or name.endswith(".") or name.partition(".")[0].upper() in _DEVICES:
        raise LibraryError(
            f"An adapter cannot be called {name[:120]!r}: use letters, digits, '.', '_' and '-' (at most 100, a letter "
            "or digit first, no '.' at the end, no device of Windows such as CON or NUL); the version is added by the "
            "library."
        )
    return name


class Library:
    """The adapters under `root` (by default the library of this machine).

    An adapter is asked for by a spec: `support` (its promoted version, or else its newest), `support@1`, or 6 or more
    digits of its id. What lies in a mounted tree is asked for by `mount/folder/name`; or by the file's own name, the
    name its trainer gave it, or a hash, where nothing stored is called so.

    Attributes:
        root: Its folder.
        mark: There while something is changed, and after a change that was killed.
        mounts: Trees of LoRA files that are listed and found in place.
        watched: Files of which one changes whenever `names` does; the index is the first.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = settings().library if root is None else root
        self._index = Index(self.root)
        self.mark = self._index.mark
        self.mounts = Mounts(self.root)
        self._promotions = PromotionFile(self.root / PROMOTIONS_NAME)
        self.watched = (self._index.path, self.root / "index.sqlite-wal", self._promotions.path)

    def add(self, folder: Path, name: str, card: AdapterCard) -> StoredAdapter:
        """Store the adapter in `folder` as the next version of `name`.

        The same content under the same name is not stored again; under another name it gains that name, and its card
        stays as it is. Made for another base it is another adapter, with an id of its own.

        Args:
            folder: A PEFT folder, or one safetensors file of another format.
            name: Name without version.
            card: From `draft_card`, with the verification that it passed.

        Raises:
            LibraryError: The name is not allowed, the proof is missing or failed, or the card is not of these files.
            FileFormatError: The files are unusable.
        """
        check_no_base_name(check_name(name), card.base.name)
        if card.verification is None or not card.verification.passed:
            raise LibraryError(
                f"The adapter for {name!r} was not stored: the library takes only what passed its proof."
            )
        if content_id(folder) != card.id:
            raise LibraryError(f"The card given for {name!r} does not describe the files in {str(folder)!r}.")
        with self._change() as names:
            if (held := self._held(card)) is not None:
                return self._add_name(held, name, names)
            identity = card.id if _card_or_none(self.folder(card.id)) is None else id_on_base(card.id, card.base)
            card = card.with_fields(id=identity, names=(_next_name(name, names),))
            kept = self.folder(card.id)
            with staged_folder(kept) as stage:
                copy_contents(folder, stage)
                if card.origin == "trained" and (folder / SEEN_NAME).is_file():
                    shutil.copyfile(folder / SEEN_NAME, stage / SEEN_NAME)
                (stage / CARD_NAME).write_text(_card_text(card), encoding="utf-8")
            self._index.put(card)
        return StoredAdapter(kept, card, card.names[-1])

    def get(self, spec: str) -> StoredAdapter:
        """Find one adapter.

        Raises:
            LibraryError: There is none, or several fit; near names are given. Or the bare name is that of the base
                too, or the mounted file cannot be used.
        """
        names = self._names_for(spec)
        if not names.rows:
            if (file := self.mounts.get(spec, id_digits(spec.lower()))) is not None:
                return StoredAdapter(file.path, file.card, file.name, mounted=file)
            names = self.names()
        stored = self._stored(names.find(spec), names)
        refuse_base_name(spec, stored.card.base.name, stored.name)
        return stored

    def list(self) -> tuple[StoredAdapter, ...]:
        """Return every name of every adapter with its card, by name and version."""
        names = self.names()
        return tuple(self._stored(row, names) for row in names.rows if self.folder(row.adapter).is_dir())

    def search(self, query: str = "") -> Search:
        """Find adapters without reading a card: what `query` describes, the best first; all of them if it is empty.

        Words may be anywhere in names, trigger words, tags, base, method, licences, description or data; a word that
        occurs nowhere is taken for one that is spelled nearly so. `base:sd15` and the like look at one field,
        `accuracy>0.8` at a metric.

        Raises:
            InputError: A filter or metric that there is not.
        """
        return search(self._index, self.mounts, self._promotions.read(), query)

    def names(self, *, wait: bool = True) -> Names:
        """Return every name and what was promoted, without reading a card.

        Args:
            wait: Wait for a change that is going on, and mend what a killed one left behind. Otherwise what the index
                holds now is taken, if it can be read.

        Raises:
            LibraryError: The history of promotions is damaged.
        """
        history = self._promotions.read()
        rows = None if wait else self._index.rows_at_once()
        return Names(self._index.rows() if rows is None else rows, history)

    def promote(self, spec: str) -> StoredAdapter:
        """Make a bare name mean one of its versions, given as `support@3`, until another is promoted.

        Raises:
            LibraryError: There is no such version, or none was given.
        """
        return self._change_history(promote, spec)

    def rollback(self, name: str) -> StoredAdapter:
        """Make a bare name mean what it did before its last promotion, which stays in the history as withdrawn.

        Raises:
            LibraryError: There is no such name, or nothing to go back to.
        """
        return self._change_history(roll_back, name)

    def folder(self, adapter: str) -> Path:
        """Return where the adapter of this content id is kept, whether it is there or not."""
        return stored_folder(self.root, adapter)

    def remove(self, spec: str) -> tuple[str, ...]:
        """Take a name away; an adapter without names is deleted. An id takes away all of its names.

        Returns:
            The names removed.

        Raises:
            LibraryError: There is no such adapter, or the bare name is that of its base too.
        """
        self._refuse_mounted(spec)
        with self._change() as names:
            row = names.find(spec)
            stored = self._stored(row, names)
            refuse_base_name(spec, stored.card.base.name, stored.name)
            by_name = "@" in spec or spec == row.name
            gone = (stored.name,) if by_name else stored.card.names
            card = stored.card.with_fields(names=tuple(name for name in stored.card.names if name not in gone))
            if card.names:
                write_text(stored.path / CARD_NAME, _card_text(card))
            else:
                with explain_os_errors(stored.path):
                    delete_folder(stored.path)
            self._index.put(card)
        return gone

    def update(self, spec: str, **fields: Any) -> StoredAdapter:
        """Change fields of a card. `evaluations` are added to those it has; any other field is replaced.

        Raises:
            LibraryError: There is no such adapter, or a field is part of its identity.
        """
        self._refuse_mounted(spec)
        if fixed := _FIXED & set(fields):
            raise LibraryError(f"The card's {min(fixed)!r} cannot be changed.")
        with self._change() as names:
            stored = self._stored(names.find(spec), names)
            if "evaluations" in fields:
                fields["evaluations"] = (*stored.card.evaluations, *fields["evaluations"])
            card = stored.card.with_fields(**fields)
            write_text(stored.path / CARD_NAME, _card_text(card))
            self._index.put(card)
        return replace(stored, card=card)

    def export(self, spec: str, out: Path) -> Path:
        """Write one adapter as a new stock PEFT folder.

        Raises:
            LibraryError: There is no such adapter.
            InputError: `out` exists and is not empty.
        """
        stored = self.get(spec)
        return export_peft(stored.path, stored.card, out)

    def rebuild(self) -> Rebuilt:
        """Read every folder again, write the index from them, and delete what killed processes left behind.

        A folder whose card is damaged, or whose files are not those its id was made from, is left out and reported.
        """
        with self._index.lock():
            for folder in self.root.glob("adapters/??"):
                sweep(folder)
            return self._index.refill()

    def _held(self, card: AdapterCard) -> AdapterCard | None:
        """Return the card of the same files for the same base, if they are here."""
        folders = (self.folder(identity) for identity in (card.id, id_on_base(card.id, card.base)))
        held = (found for folder in folders if (found := _card_or_none(folder)) is not None)
        return next((c for c in held if c.base.is_same(card.base, card.components)), None)

    def _add_name(self, held: AdapterCard, name: str, names: Names) -> StoredAdapter:
        folder = self.folder(held.id)
        same = [full for full in held.names if full.rpartition("@")[0] == name]
        if same:
            return StoredAdapter(folder, held, same[-1])
        card = held.with_fields(names=(*held.names, _next_name(name, names)))
        write_text(folder / CARD_NAME, _card_text(card))
        self._index.put(card)
        return StoredAdapter(folder, card, card.names[-1])

    def _change_history(self, change: Callable[[Names, str], History], spec: str) -> StoredAdapter:
        """Write the history that `change` makes and return the adapter that the bare name means then."""
        self._refuse_mounted(spec)
        with self._index.lock():
            names = self._current_names()
            if spec == (held := self._stored(names.find(spec), names)).card.base.name:
                raise LibraryError(
                    f"{spec!r} is the name of a base too, and alone always means that: there is nothing to go back to. "
                    f"Ask for the adapter with its version, as in {held.name!r}."
                )
            after = Names(names.rows, change(names, spec))
            if after.history != names.history:
                self._promotions.write(after.history)
            return self._stored(after.find(spec.partition("@")[0]), after)

    def _stored(self, row: IndexRow, names: Names) -> StoredAdapter:
        folder = self.folder(row.adapter)
        name = f"{row.name}@{row.version}"
        card = read_card(folder)
        if card is None:
            raise LibraryError(f"The folder of {name!r} is gone: {str(folder)!r}. Run `haori library rebuild`.")
        promoted = names.promoted(row.name)
        return StoredAdapter(folder, card, name, promoted[1].time if promoted and promoted[0] == row else None)

    def _refuse_mounted(self, spec: str) -> None:
        if self.mounts.is_mounted(spec):
            raise LibraryError(
                f"{spec!r} lies in a mounted folder, which is only read: change or delete the file itself, or run "
                f"`haori library unmount {spec.partition('/')[0]}`."
            )

    def _names_for(self, spec: str) -> Names:
        """Return the names that fit a spec, if any does."""
        rows = self._index.rows_of(spec.partition("@")[0], id_digits(spec))
        return Names(rows, self._promotions.read())

    @contextmanager
    def _change(self) -> Iterator[Names]:
        """Hold the lock and yield every name; the mark stays behind if the change does not come to its end."""
        with self._index.lock():
            names = self._current_names()
            was_stale = self.mark.exists()
            with explain_os_errors(self.mark):
                self.mark.touch()
            try:
                yield names
            except LibraryError:
                if not was_stale:
                    self.mark.unlink()  # refused before anything was written
                raise
            if not was_stale:
                self.mark.unlink()

    def _current_names(self) -> Names:
        """Return every name; the caller holds the lock."""
        return Names(self._index.current_rows(), self._promotions.read())


def _next_name(name: str, names: Names) -> str:
    return f"{name}@{max((row.version for row in names.versions(name)), default=0) + 1}"


def _card_or_none(folder: Path) -> AdapterCard | None:
    try:
        return read_card(folder)
    except LibraryError:
        return None


def _card_text(card: AdapterCard) -> str:
    return card.model_dump_json(indent=2) + "\n"
