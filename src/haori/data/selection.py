"""What is read of a data section: the split to train on, the one to validate with, or the one to measure on.

Only a folder or a hub dataset has splits. What is for testing is never trained on, and what was taken and left is said.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from haori.core.errors import DataError
from haori.data.section import DataSection
from haori.data.sources import Source, find_source, hub_splits
from haori.data.splits import Splits, choose_split, kind_of, splits_of_folder, unknown_split

__all__ = ["measuring_source", "training_sources"]

_LISTED = 5
_REST = "files without a split in their names"


def training_sources(section: DataSection) -> list[Source]:
    """Return the rows to train on and, where they are apart, those to validate with.

    Raises:
        DataError: There is no such data, no such split, or it is for testing.
    """
    whole = _Whole(section.path, section.revision)
    if section.validation is not None:
        return [whole.take(whole.for_training(section.split), "train"), _validation(section.validation)]
    chosen = whole.for_training(section.split)
    held = choose_split(whole.names, "validation", whole.where) if chosen is not None else None
    if held is None or held == chosen:
        return [whole.take(chosen, "train")]
    return [whole.take(chosen, "train", beside=held), whole.take(held, "validation", silent=True)]


def measuring_source(section: DataSection) -> Source:
    """Return the rows to measure on: the split that was asked for, or else the test split, or validation's.

    Raises:
        DataError: There is no such data or split.
    """
    whole = _Whole(section.path, section.revision)
    if not whole.names:
        return whole.take(whole.plain(section.split), "test")
    if "split" in section.model_fields_set:
        chosen = whole.named(section.split)
        if chosen is None:
            raise unknown_split(whole.where, section.split, whole.names)
        return whole.take(chosen, "test")
    found = (choose_split(whole.names, kind, whole.where) for kind in ("test", "validation"))
    chosen = next((name for name in found if name is not None), None)
    return whole.take(chosen or whole.named("train") or whole.names[0], "test")


def _validation(path: str) -> Source:
    whole = _Whole(path, None)
    if len(whole.names) + bool(whole.splits.rest) <= 1:
        return whole.take(whole.names[0] if whole.names else None, "validation")
    chosen = choose_split(whole.names, "validation", whole.where)
    if chosen is None:
        raise DataError(f"{whole.where} has no split to validate with; it has {', '.join(whole.names)}; give a file.")
    return whole.take(chosen, "validation")


class _Whole:
    """A source with all its splits."""

    def __init__(self, path: str, revision: str | None) -> None:
        self.source = find_source(path, revision=revision)
        kind = "folder" if self.source.folder else "file" if self.source.hub is None else "dataset"
        self.where = f"The {kind} {path!r}"
        self.splits = Splits({}, ())
        if self.source.hub is not None:
            self.splits = Splits(dict.fromkeys(hub_splits(path, revision), ()), ())
        elif (folder := self.source.folder) is not None:
            self.splits = splits_of_folder(folder, [file for file, _ in self.source.files])
        self.names = list(self.splits.named)

    def named(self, wanted: str) -> str | None:
        """Return the split meant by `wanted`; files without a split are for training."""
        if self.source.hub is not None and ("[" in wanted or "+" in wanted):
            parts = [part.partition("[")[0].strip() for part in wanted.split("+")]
            return wanted if all(part in self.names for part in parts) else None
        self._refuse_slice(wanted)
        found = choose_split(self.names, wanted, self.where)
        return _REST if found is None and kind_of(wanted) == "train" and self.splits.rest else found

    def plain(self, wanted: str) -> str | None:
        """Return what to read where no split is known: a hub dataset's as asked for, or everything."""
        if self.source.hub is not None:
            return wanted
        self._refuse_slice(wanted)
        if kind_of(wanted) != "train":
            why = "none of its files is named for one" if self.source.folder is not None else "one file is read whole"
            raise DataError(f"{self.where} has no split {wanted!r}: {why}; leave data.split out.")
        return None

    def _refuse_slice(self, wanted: str) -> None:
        if "[" in wanted or "+" in wanted:
            raise DataError(
                f"data.split={wanted!r}: only datasets of the hub are cut or joined like this, and this is "
                "none; give one split, and --set data.max_rows=N for a part of it."
            )

    def for_training(self, wanted: str) -> str | None:
        """Return the split to train on; None for everything.

        Raises:
            DataError: There is none, or it is for testing while there is another.
        """
        if not self.names:
            return self.plain(wanted)
        chosen = self.named(wanted)
        others = [name for name in self.names if kind_of(name) != "test"] + [_REST] * bool(self.splits.rest)
        if chosen is None and not others:
            raise DataError(
                f"{self.where} holds only what is for testing ({', '.join(self.names)}), which is not trained on "
                f"unless it is asked for: --set data.split={self.names[0]}."
            )
        if chosen is None:
            raise unknown_split(self.where, wanted, self.names)
        if kind_of(chosen) == "test" and others:
            raise DataError(
                f"{self.where} has {chosen!r} for testing, and {', '.join(others)} besides; what is for testing is not "
                "trained on. Choose another data.split, or give the file itself as data.path."
            )
        return chosen

    def take(self, chosen: str | None, purpose: str, *, beside: str | None = None, silent: bool = False) -> Source:
        """Return the chosen split as a source that says what was taken as what, and what was not."""
        if chosen is None:
            return self.source
        remark = f"Read {self._words(chosen)} as {purpose}"
        if beside is not None:
            remark += f", {self._words(beside)} as validation"
        left = [name for name in (*self.names, *([_REST] if self.splits.rest else [])) if name not in (chosen, beside)]
        remark += f"; not read: {'; '.join(map(self._words, left))}." if left else "."
        remarks = () if silent or not self.names else (remark,)
        if self.source.hub is not None:
            return replace(self.source, hub=(self.source.hub[0], chosen), remarks=remarks)
        paths = set(self._paths(chosen))
        files = tuple(pair for pair in self.source.files if pair[0] in paths)
        return replace(self.source, files=files, ignored=() if silent else self.source.ignored, remarks=remarks)

    def _paths(self, name: str) -> Sequence[Path]:
        return self.splits.rest if name == _REST else self.splits.named.get(name, ())

    def _words(self, name: str) -> str:
        folder = self.source.folder
        if folder is None:
            return f"the split {name}"
        paths = [str(path.relative_to(folder)) for path in self._paths(name)]
        more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
        return f"{name} ({', '.join(paths[:_LISTED])}{more})"
