"""What is wrong with a row, as a sentence that names file, row and field."""

from typing import Any

from haori.core.errors import DataError
from haori.data.readers import RawRow, shorten

__all__ = ["problem", "value_of"]


def problem(row: RawRow, field: str, what: str) -> DataError:
    """Return the error that names file, row and field, and shows the row."""
    return DataError(f"{row.origin}:{field}: {what}; the row is {shorten(row.values)}")


def value_of(row: RawRow, column: str) -> Any:
    """Return what a row holds in a column.

    Raises:
        DataError: The row lacks the column.
    """
    if column not in row.values:
        raise problem(row, column, "this row lacks the field")
    return row.values[column]
