"""Readers of single files: JSONL, JSON, CSV, TSV, Parquet, Arrow and plain text, each a stream of rows.

A row is a dictionary of columns with its origin `file:row`: the line in text files (where the row begins), the
position from 1 in JSON arrays, Parquet and Arrow. A row that cannot be read carries a `problem`; a file that cannot be
read on raises. Only a JSON file that is one object (`{"data": [...]}`) is held in memory whole. Knows nothing
about formats of rows.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from haori.core.errors import DataError

__all__ = ["READERS", "RawRow", "shorten"]

_LONGEST_LINE_BYTES = 64 << 20
_LONGEST_CELL = 16 << 20
_CHUNK = 1 << 20


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which no name may come twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise _TwiceError(twice)
    return found


class _TwiceError(ValueError):
    """A name that comes twice in an object."""


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_ARRAY_START = re.compile(r"\s*\[\s*")
_ARRAY_GAP = re.compile(r"\s*(?:,\s*(?!\])|(?=\]))")
_ARRAY_END = object()


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in a file.

    Attributes:
        origin: `file:row`.
        file: The file's name; formats are detected per file.
        values: Columns and values.
        done: Bytes of the file read so far, for the progress display.
        problem: Why this row cannot be read, or None.
    """

    origin: str
    file: str
    values: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    problem: DataError | None = None


def shorten(value: Any, limit: int = 160) -> str:
    """Return a row or text as one short line for a message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    text = "".join(c if c.isprintable() else "?" for c in text[: 2 * limit])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _lines(path: Path, name: str) -> Iterator[tuple[int, str, int]]:
    """Yield (line number from 1, text with its line break, bytes read so far) of a UTF-8 file."""
    with path.open("rb") as file:
        _refuse_binary(file, name)
        done = 0
        for number, raw in enumerate(iter(lambda: file.readline(_LONGEST_LINE_BYTES), b""), start=1):
            if len(raw) == _LONGEST_LINE_BYTES:
                raise DataError(f"{name}:{number}: this line is longer than 64 MB; a text file has one row per line.")
            done += len(raw)
            yield number, _decode(raw, f"{name}:{number}", first=number == 1), done


def _refuse_binary(file: BinaryIO, name: str) -> None:
    head = file.read(8192)
    file.seek(0)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16 text; save it as UTF-8 and try again.")
    if b"\0" in head or head.startswith((b"\x1f\x8b", b"%PDF", b"\x89PNG")):
        raise DataError(
            f"{name} is a binary file, not the text that its name says; allowed are "
            "JSONL, JSON, CSV, TSV and TXT in UTF-8, and Parquet."
        )


def _decode(raw: bytes, origin: str, *, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        near = raw[max(0, error.start - 60) : error.start + 60].decode("utf-8", "replace")
        raise DataError(
            f"{origin}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 text; "
            f"save the file as UTF-8 and try again; it is in {shorten(near)}"
        ) from None


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
    except _TwiceError as error:
        raise DataError(f"{origin}: {str(error)!r} is there twice; keep one; the row is {shorten(text)}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: broken JSON ({error.msg} at column {error.colno}); the row is {shorten(text)}"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{origin}: this JSON cannot be read; the row is {shorten(text)}") from None
    return _require_object(value, origin)


def _require_object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{origin}: a row must be an object such as "
            f'{{"prompt": "...", "completion": "..."}}, not {type(value).__name__}; the row is {shorten(value)}'
        )
    return value


def _read_jsonl(path: Path, name: str) -> Iterator[RawRow]:
    for number, line, done in _lines(path, name):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        if number == 1 and line.lstrip().startswith("["):
            raise DataError(
                f"{origin}: this is a JSON array, not one object per line; rename the file to end in .json."
            )
        try:
            yield RawRow(origin, name, _parse(line, origin), done)
        except DataError as error:
            yield RawRow(origin, name, done=done, problem=error)


def _read_json(path: Path, name: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        _refuse_binary(file, name)
        first = file.readline(_LONGEST_LINE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        while first == b"" and (line := file.readline(_LONGEST_LINE_BYTES)):
            first = line.lstrip()
        # An object that ends with its line, and more lines after it: one row per line after all.
        is_lines = first.startswith(b"{") and _is_object(first) and any(iter(lambda: file.read(_CHUNK).strip(), b""))
    if first.startswith(b"["):
        yield from _read_array(path, name)
    elif is_lines:
        yield from _read_jsonl(path, name)
    elif first:
        yield from _read_document(path, name)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_document(path: Path, name: str) -> Iterator[RawRow]:
    document = _parse(_decode(path.read_bytes(), name, first=True), name)
    rows = document.get("data", document)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f'{name}: "data" must be an array of rows, not {type(rows).__name__}.')
    for number, value in enumerate(rows, start=1):
        yield _array_row(value, name, number, number * path.stat().st_size // len(rows))


def _array_row(value: Any, name: str, number: int, done: int) -> RawRow:
    origin = f"{name}:{number}"
    try:
        return RawRow(origin, name, _require_object(value, origin), done)
    except DataError as error:
        return RawRow(origin, name, done=done, problem=error)


def _read_array(path: Path, name: str) -> Iterator[RawRow]:
    """Stream the elements of a JSON array, holding one element and a chunk at a time."""
    buffer, position, number, size, more, gap = "", 0, 0, _CHUNK, True, _ARRAY_START
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        while True:
            try:
                value, end = _element(buffer, position, gap, more=more)
            except _TwiceError as error:
                what = f"{name}:{number + 1}: {str(error)!r} is there twice; keep one"
                raise DataError(f"{what}; the row is {shorten(buffer[position : position + 1000])}") from None
            except (json.JSONDecodeError, RecursionError) as error:
                if not more or _is_final(error, len(buffer)):
                    raise _broken_array(name, number + 1, error, buffer[position:]) from None
                chunk, size = _text_chunk(file.read, size, name), size * 2
                more = bool(chunk)
                buffer, position = buffer[position:] + chunk, 0
                continue
            position, gap, size = end, _ARRAY_GAP, _CHUNK
            if value is _ARRAY_END:
                break
            number += 1
            yield _array_row(value, name, number, raw.tell())
        if buffer[position:].strip() or file.read().strip():
            raise DataError(f"{name}: there is text after the end of the JSON array; remove it.")


def _element(buffer: str, position: int, gap: re.Pattern[str], *, more: bool) -> tuple[Any, int]:
    """Return the array's next element, or its end, and the position after it."""
    match = gap.match(buffer, position)
    if match is None or match.end() == len(buffer):
        raise json.JSONDecodeError("Expecting ',' or ']'", buffer, len(buffer) if more else position)
    if buffer[match.end()] == "]":
        return _ARRAY_END, match.end() + 1
    value, end = _DECODER.raw_decode(buffer, match.end())
    if more and end == len(buffer):  # a number may go on in the next chunk
        raise json.JSONDecodeError("Unfinished", buffer, end)
    return value, end


def _is_final(error: Exception, size: int) -> bool:
    """Say whether more text cannot mend the error: it lies well before the end of what was read."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated") and size - error.pos > 1000


def _text_chunk(read: Callable[[int], str], size: int, name: str) -> str:
    try:
        return read(size)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{name} holds a byte (0x{byte:02x}) that is not UTF-8 text; save the file as UTF-8.") from None


def _broken_array(name: str, number: int, error: Exception, text: str) -> DataError:
    what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return DataError(f"{name}:{number}: broken JSON ({what}); the row is {shorten(text[:1000])}")


def _read_csv(path: Path, name: str) -> Iterator[RawRow]:
    first = next((line for _, line, _ in _lines(path, name) if line.strip()), "")
    # Spreadsheets of many countries write semicolons.
    yield from _read_table(path, name, ";" if ";" in first and "," not in first else ",")


def _read_tsv(path: Path, name: str) -> Iterator[RawRow]:
    yield from _read_table(path, name, "\t")


def _read_table(path: Path, name: str, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(_LONGEST_CELL)
    position = [0, 0]  # lines and bytes read so far

    def text() -> Iterator[str]:
        for number, line, done in _lines(path, name):
            position[:] = [number, done]
            yield line

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        origin = f"{name}:{position[0] + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{origin}: broken CSV ({error}); put a cell with quotes in quotes and double them."
            ) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, origin)
        elif len(cells) != len(header):
            count = f"{len(cells)} cells and the header has {len(header)}"
            problem = DataError(f"{origin}: this row has {count}; the row is {shorten(cells)}")
            yield RawRow(origin, name, done=position[1], problem=problem)
        else:
            yield RawRow(origin, name, dict(zip(header, cells, strict=True)), position[1])


def _header(cells: list[str], origin: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = next((cell for cell in header if cell and header.count(cell) > 1), None)
    if twice is not None:
        raise DataError(f"{origin}: the column {twice!r} is there twice; give every column a name of its own.")
    return header


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, size = 0, path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", name, _without_nulls(values), number * size // total)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{name}:{number + 1}" if number else name
        raise DataError(f"{where} is not a readable Parquet file ({shorten(str(error), 100)}).") from None


def _read_arrow(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of a file as `datasets` saves them: an Arrow stream."""
    import pyarrow as pa

    number, size = 0, path.stat().st_size
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", name, _without_nulls(values), min(size, file.tell()))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{name}:{number + 1}" if number else name
        raise DataError(f"{where} is not a readable Arrow file ({shorten(str(error), 100)}).") from None


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a file with a schema without the nulls in its structs: there each has the fields of all."""
    return {name: _pruned(value) if isinstance(value, (list, dict)) else value for name, value in values.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _pruned(part) for name, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _read_txt(path: Path, name: str) -> Iterator[RawRow]:
    """Yield a row per paragraph; blank lines part paragraphs."""
    paragraph: list[str] = []
    start = position = 0
    for number, line, done in _lines(path, name):
        position = done
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield RawRow(f"{name}:{start}", name, {"text": "".join(paragraph).rstrip("\r\n")}, done)
            paragraph = []
    if paragraph:
        yield RawRow(f"{name}:{start}", name, {"text": "".join(paragraph).rstrip("\r\n")}, position)


READERS: dict[str, Callable[[Path, str], Iterator[RawRow]]] = {
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
}
