"""Sets of pictures whose bytes lie in rows: saved by `datasets`, as Parquet, or on the hub.

The pictures are written into the cache once, keyed by the set's content, and read from there as files. A table whose
rows name files instead lists those, from the folder that it is in.
"""

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from haori.core.errors import DataError
from haori.core.hashing import hash_data, short
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.folder_files import MAX_FILES
from haori.data.pictures.card import card_licence
from haori.data.pictures.listing import Listing, PictureFile, listed
from haori.data.pictures.metadata import caption_column, caption_of
from haori.data.pictures.opening import MAX_FILE_BYTES
from haori.data.pictures.section import PictureSection
from haori.data.progress import tracked
from haori.data.readers import RawRow
from haori.data.selection import training_sources
from haori.data.sources import Source

__all__ = ["list_table"]

_VERSION = 1
_INDEX = "rows.jsonl"
_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
_LICENCE = ("license", "licence")


def list_table(given: str, section: PictureSection, *, prior: bool = False) -> Listing:
    """List the pictures of a set; a validation split of its own is held out.

    Raises:
        DataError: It cannot be found or read, has no such split, or no column with pictures.
    """
    sources = training_sources(section.model_copy(update={"path": given, "validation": None}))
    listing = Listing("table", [], notes=[remark for source in sources for remark in source.remarks])
    for source, held_out in zip(sources, (False, True), strict=False):
        _list_source(listing, source, section, prior=prior, held_out=held_out)
    if sources[0].ignored:
        listing.ignored.extend(sources[0].ignored)
    if not listing.licences and sources[0].folder and (licence := card_licence(sources[0].folder)):
        listing.licences.append(licence)
    return replace(listing, layout="datasets" if sources[0].hub or sources[0].folder else Path(given).suffix[1:])


def _list_source(listing: Listing, source: Source, section: PictureSection, *, prior: bool, held_out: bool) -> None:
    folder = settings().cache / "picture-sets" / short(hash_data([_VERSION, source.content_hash]))
    if not folder.is_dir():
        with staged_folder(folder) as stage:
            _write_rows(source, stage)
    rows = [json.loads(line) for line in (folder / _INDEX).read_text("utf-8").splitlines()]
    column = caption_column([row["values"] for row in rows], section, source.name)
    unused: Counter[str] = Counter()
    for row in rows:
        values = row["values"]
        if row["problem"] is not None:
            listing.problems.append(DataError(row["problem"]))
            continue
        listing.files.append(
            PictureFile(
                row["origin"], folder / row["file"], _reader(values, column, row["origin"]), section,
                prior=prior, held_out=held_out,
            )
        )  # fmt: skip
        listing.licences.extend(str(values[name]) for name in _LICENCE if values.get(name))
        unused.update(key for key in values if key not in (column, *_LICENCE))
    if unused:
        told = listed([f"{name} ({count:,})" for name, count in unused.items()], 10)
        listing.notes.append(f"Columns of the set not used: {told}.")


def _reader(values: Mapping[str, Any], column: str | None, origin: str) -> Any:
    return lambda: caption_of(values, column, origin)


def _write_rows(source: Source, stage: Path) -> None:
    """Write each picture as a file, and what else its row says into an index."""
    column: str | None = None
    with (stage / _INDEX).open("w", encoding="utf-8") as index:
        for number, row in enumerate(tracked(source.rows(), "Unpacking pictures", total=None), start=1):
            if number > MAX_FILES:
                raise DataError(
                    f"{source.name!r} holds more than the {MAX_FILES:,} pictures that are read from one set; part it."
                )
            column = column or _picture_column(row, source)
            problem, raw = row.problem, b""
            try:
                if problem is None:
                    raw = _bytes_of(row, column)
            except DataError as error:
                problem = error
            name = f"{number:08}"
            if problem is None:
                (stage / name).write_bytes(raw)
            values = {key: _plain(value) for key, value in row.values.items() if key != column and value is not None}
            told = {"origin": row.origin, "file": name, "values": values, "problem": problem and str(problem)}
            index.write(f"{json.dumps(told, ensure_ascii=True)}\n")


def _picture_column(row: RawRow, source: Source) -> str:
    if row.problem is not None:
        raise row.problem
    held = [name for name, value in row.values.items() if _raw(value) is not None]
    named = [name for name in held if name.lower() in _COLUMNS] or held
    if len(named) == 1:
        return named[0]
    if named:
        raise DataError(f"{source.name!r} has several columns with pictures: {', '.join(named)}; keep one of them.")
    raise DataError(
        f"{source.name!r} holds no pictures: no column of {row.origin} has the bytes of one. Its columns are "
        f"{listed(list(row.values), 10)}."
    )


def _bytes_of(row: RawRow, column: str) -> bytes:
    raw = _raw(row.values.get(column))
    if raw is None:
        raise DataError(f"{row.origin}:{column}: the row has no picture.")
    if len(raw) > MAX_FILE_BYTES:
        raise DataError(f"{row.origin}:{column}: the picture has {len(raw) >> 20} MiB; it may have "
                        f"{MAX_FILE_BYTES >> 20} MiB.")  # fmt: skip
    return raw


def _raw(value: Any) -> bytes | None:
    """Return the bytes of a picture: as they are, as `datasets` stores them, or of one that it has decoded."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if hasattr(value, "save") and hasattr(value, "mode"):
        buffer = io.BytesIO()
        value.save(buffer, "PNG" if value.mode in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"} else "TIFF")
        return buffer.getvalue()
    return None


def _plain(value: Any) -> Any:
    """Return what the index can hold of a value: bytes and the like as a word."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return f"<{type(value).__name__}>"
    return value
