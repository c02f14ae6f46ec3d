"""Tokens whose log-probabilities a client asks for by id, at any position of a prompt: a full or sparse (CSR) table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError
from haori.serve.request import TokenLogprob
from haori.server.tinker.fields import TargetTensor
from haori.server.tinker.schema import FLOAT32

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Targets", "read_targets", "write_targets"]

_MOST = 1 << 20
_NOTHING = -1  # a cell that asks for nothing


@dataclass(frozen=True)
class Targets:
    """A table of ids: row i is of the prompt's token i + 1.

    Attributes:
        shape: Rows and columns.
        rows: Row of each cell.
        ids: What each cell asks for, or -1.
        sparse: Starts of rows, and columns, of a sparse table.
    """

    shape: tuple[int, int]
    rows: "np.ndarray[Any, Any]"
    ids: "np.ndarray[Any, Any]"
    sparse: tuple[Sequence[int], Sequence[int]] | None

    def by_position(self) -> Mapping[int, tuple[int, ...]]:
        """Return the ids that are wanted at each position of the prompt."""
        found: dict[int, list[int]] = {}
        for row, wanted in zip(self.rows.tolist(), self.ids.tolist(), strict=True):
            if wanted != _NOTHING:
                found.setdefault(row + 1, []).append(wanted)
        return {position: tuple(ids) for position, ids in found.items()}


def read_targets(sent: TargetTensor, prompt_length: int) -> Targets:
    """Read the table that a client sends.

    Raises:
        InputError: It does not fit the prompt, or itself.
    """
    import numpy as np

    rows, columns = sent.shape
    if rows != prompt_length - 1 or columns < 1:
        raise InputError(
            f"target_prompt_logprobs has the shape {sent.shape}; give [{prompt_length - 1}, K]: a row for each token "
            "of the prompt after the first."
        )
    count = len(sent.data)
    if count > _MOST:
        raise InputError(f"target_prompt_logprobs has {count:,} cells; give {_MOST:,} at most, or a sparse table.")
    ids = np.asarray(sent.data, np.int64)
    starts, at = sent.sparse_crow_indices, sent.sparse_col_indices
    if starts is None or at is None:
        if starts is not at or count != rows * columns:
            raise InputError(f"target_prompt_logprobs has {count} values for the shape {sent.shape}.")
        return Targets((rows, columns), np.repeat(np.arange(rows), columns), ids, None)
    counts = np.diff(np.asarray(starts, np.int64))
    fits = (
        len(starts) == rows + 1 and starts[0] == 0 and starts[-1] == count and bool((counts >= 0).all())
        and len(at) == count and all(0 <= column < columns for column in at)
    )  # fmt: skip
    if not fits:
        raise InputError(f"target_prompt_logprobs has sparse indices that do not fit the shape {sent.shape}.")
    return Targets((rows, columns), np.repeat(np.arange(rows), counts.astype(np.int64)), ids, (starts, at))


def write_targets(sent: Any, targets: Targets, found: Sequence[TokenLogprob]) -> None:
    """Write a table of the same form with the log-probabilities; NaN where nothing was asked for.

    Args:
        sent: The `Tensor` that is written.
        targets: What was asked for.
        found: Of each token of the prompt after the first; what was asked for by id comes last in its `top`.
    """
    import numpy as np

    values = np.full(len(targets.ids), np.nan, "<f4")
    asked = targets.ids != _NOTHING
    counts = np.bincount(targets.rows[asked], minlength=targets.shape[0]).tolist()
    values[asked] = [value for row, count in enumerate(counts) if count for _, value in found[row].top[-count:]]
    sent.dtype = FLOAT32
    sent.shape.extend(targets.shape)
    if targets.sparse is None:
        sent.dense = values.tobytes()
        return
    starts, columns = targets.sparse
    sent.sparse_csr.values = values.tobytes()
    sent.sparse_csr.crow_indices = np.asarray(starts, "<i8").tobytes()
    sent.sparse_csr.col_indices = np.asarray(columns, "<i8").tobytes()
