"""Texts to classify, read from a file: every row is one, in the order of the file, and none is left out."""

from pathlib import Path

from haori.core.errors import DataError
from haori.data.cleaning import clean_text
from haori.data.columns import FileColumns, survey
from haori.data.readers import RawRow
from haori.data.row_problem import problem, value_of
from haori.data.sources import find_source
from haori.tasks.classification.columns import text_columns

__all__ = ["read_texts"]


def read_texts(path: Path, column: str | None = None) -> list[str | tuple[str, str]]:
    """Return the text, or pair of texts, of every row.

    Args:
        path: A data file or folder.
        column: The column of the text; by default it is found by its name.

    Raises:
        DataError: There is no such file or column, a row has no text, or it cannot be read.
    """
    source = find_source(str(path))
    columns = survey(source.rows())
    found: list[str | tuple[str, str]] = []
    chosen: dict[str, tuple[str, ...]] = {}
    for row in source.rows():
        if row.problem is not None:
            raise row.problem
        if row.file not in chosen:
            chosen[row.file] = _columns(row.file, columns[row.file], column)
        texts = [_text(row, name) for name in chosen[row.file]]
        found.append(texts[0] if len(texts) == 1 else (texts[0], texts[1]))
    if not found:
        raise DataError(f"{str(path)!r} has no rows.")
    return found


def _columns(file: str, columns: FileColumns, column: str | None) -> tuple[str, ...]:
    if column is not None:
        if column not in columns.held:
            raise DataError(f"{file} has no column {column!r}; it has {', '.join(map(repr, columns.held))}.")
        return (column,)
    names = text_columns({name.strip().lower(): name for name in columns.names()})
    if names is None:
        has = ", ".join(map(repr, columns.held))
        raise DataError(f"{file} has the columns {has}, of which none is known for a text; name it with --column.")
    return names


def _text(row: RawRow, column: str) -> str:
    value = value_of(row, column)
    if not isinstance(value, str) or not value.strip():
        raise problem(row, column, "this must be a text that is not blank")
    return clean_text(value)[0]
