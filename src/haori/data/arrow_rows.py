"""Rows kept in Arrow under the cache: written a few at a time, opened with the report and the mask of held-out rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import ValidationError

from haori.core.records import Record
from haori.core.storage import write_text

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

__all__ = ["KeptRows", "arrow_rows", "keep_report", "open_kept", "write_arrow"]

_ROWS, _HELD, _REPORT = "rows.arrow", "validation.npy", "report.json"
_BATCH = 500

R = TypeVar("R", bound=Record)


class KeptRows(NamedTuple):
    """Both parts of a split."""

    train: "Dataset"
    validation: "Dataset"


def write_arrow(folder: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Write rows into `folder` as they come, holding only a few in memory.

    Args:
        folder: Where to.
        rows: The rows, each with the fields of the schema.
        schema: As pyarrow has it.
    """
    import pyarrow as pa

    batch: list[dict[str, Any]] = []
    with pa.OSFile(str(folder / _ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for row in rows:
            batch.append(row)
            if len(batch) >= _BATCH:
                stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()
        if batch:
            stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def keep_report(folder: Path, held: "NDArray[np.bool_]", report: Record) -> None:
    """Write which rows are held out, and the report, beside the rows."""
    import numpy as np

    np.save(folder / _HELD, held, allow_pickle=False)
    write_text(folder / _REPORT, report.model_dump_json())


def arrow_rows(folder: Path) -> "Dataset":
    """Return all rows, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / _ROWS))


def open_kept(folder: Path, kind: type[R]) -> tuple[KeptRows, R] | None:
    """Return the split and its report; None when there is none, or when another version wrote it."""
    import numpy as np

    try:
        report = kind.model_validate_json((folder / _REPORT).read_text(encoding="utf-8"))
        held = np.load(folder / _HELD, allow_pickle=False)
    except (OSError, ValueError, ValidationError):
        return None
    rows = arrow_rows(folder)
    return KeptRows(rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))), report
