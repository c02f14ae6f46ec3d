"""Captions in a table beside the pictures: `metadata.jsonl`, `.csv` or `.parquet`, as `datasets` reads image folders.

Each row names a picture by `file_name`, from the folder that the table is in.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haori.core.errors import DataError, nearest
from haori.data.pictures.listing import listed, picture_origin
from haori.data.pictures.section import PictureSection
from haori.data.readers import READERS

__all__ = ["METADATA_NAMES", "Metadata", "MetadataCaption", "caption_column", "caption_of", "read_metadata"]

METADATA_NAMES = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})
_FILE, _LICENCE = "file_name", ("license", "licence")
_CAPTIONS = ("text", "caption", "prompt", "description")


@dataclass(frozen=True, slots=True)
class MetadataCaption:
    """A caption and the row that it stands in."""

    caption: str
    origin: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the tables of a folder say.

    Attributes:
        captions: By picture.
        files: The tables.
        notes: What a user should know.
        problems: Rows that cannot be used.
        licences: What a column `license` says.
    """

    captions: dict[Path, MetadataCaption] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    problems: list[DataError] = field(default_factory=list)
    licences: list[str] = field(default_factory=list)


def read_metadata(folder: Path, given: str, tables: Sequence[Path], section: PictureSection) -> Metadata:
    """Read the tables of a folder.

    Raises:
        DataError: A table cannot be read, or it is not clear which column holds the captions.
    """
    found, unused = Metadata(), Counter[str]()
    for table in tables:
        name = picture_origin(given, folder, table)
        found.files.add(table)
        rows = list(READERS[table.suffix](table, name))
        column = caption_column([row.values for row in rows], section, name)
        for row in rows:
            try:
                if row.problem is not None:
                    raise row.problem
                path = _named_file(folder, table.parent, row.values, row.origin)
                caption = caption_of(row.values, column, row.origin)
            except DataError as error:
                found.problems.append(error)
                continue
            if path in found.captions and caption not in (None, found.captions[path].caption):
                found.problems.append(DataError(f"{row.origin}: {row.values[_FILE]} comes a second time."))
            elif caption is not None:
                found.captions[path] = MetadataCaption(caption, row.origin)
            found.licences.extend(str(row.values[name]) for name in _LICENCE if row.values.get(name))
            unused.update(key for key in row.values if key not in (_FILE, column, *_LICENCE))
    if unused:
        told = listed([f"{name} ({count:,})" for name, count in unused.items()], 10)
        found.notes.append(f"Columns of the metadata not used: {told}.")
    return found


def caption_column(rows: Iterable[Mapping[str, Any]], section: PictureSection, where: str) -> str | None:
    """Return the column that holds captions; None where there is none.

    Raises:
        DataError: There are several, or not the one that was asked for.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    if section.caption_column is not None:
        if section.caption_column not in names:
            hint = nearest(section.caption_column, names) or f"it has {listed(names, 10)}."
            raise DataError(f"{where} has no column {section.caption_column!r}; {hint}")
        return section.caption_column
    present = [name for name in names if name.lower() in _CAPTIONS]
    if len(present) > 1:
        raise DataError(
            f"{where} has several columns for captions: {', '.join(present)}; say which with --set "
            f"data.caption_column={present[0]}."
        )
    return present[0] if present else None


def caption_of(values: Mapping[str, Any], column: str | None, origin: str) -> str | None:
    """Return the caption of a row, its lines without space around them; None if it has none.

    Raises:
        DataError: It is no text.
    """
    value = values.get(column) if column is not None else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{origin}:{column}: a caption must be text, not {type(value).__name__}.")
    return "\n".join(" ".join(line.split()) for line in value.splitlines() if line.strip()) or None


def _named_file(folder: Path, beside: Path, values: Mapping[str, Any], origin: str) -> Path:
    name = values.get(_FILE)
    if not isinstance(name, str) or not name:
        hint = nearest(_FILE, list(values))
        raise DataError(f"{origin}: the row has no {_FILE!r} with the name of a picture{'; ' if hint else '.'}{hint}")
    path = beside / name
    if ".." in Path(name).parts or not path.is_relative_to(folder):
        raise DataError(f"{origin}:{_FILE}: {name!r} lies outside of the folder; pictures must be in it.")
    if not path.is_file():
        hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{origin}:{_FILE}: there is no picture {name!r}{'; ' if hint else '.'}{hint}")
    return path
