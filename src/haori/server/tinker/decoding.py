"""Reads a `ForwardBackwardRequest`: every shape, type and size is checked, and nothing is passed over.

What depends on the base (ids, the context, what a loss needs) is checked where the rows are trained.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.server.tinker.schema import FLOAT32, INT32, INT64, message

if TYPE_CHECKING:
    import numpy as np

    from haori.jobs.tenants.records import Datum

__all__ = ["ForwardRequest", "read_forward"]

_MOST_ROWS = 4096
_MOST_VALUES = 1 << 24  # in one tensor, unfolded: a sparse one could claim any shape
_MOST_ALL_VALUES = 1 << 25
_MOST_INPUTS = 16
_DTYPES = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4"}


@dataclass(frozen=True)
class ForwardRequest:
    """A request for a forward, with its backward unless `forward_only`."""

    model_id: str
    seq_id: int
    data: "list[Datum]"
    loss: str
    config: dict[str, float | str]
    forward_only: bool


def read_forward(body: bytes) -> ForwardRequest:
    """Read the bytes of a `ForwardBackwardRequest`.

    Raises:
        DataError: They are none, or a row cannot be used; the sentence names it.
    """
    from google.protobuf.message import DecodeError

    sent = message("ForwardBackwardRequest")
    try:
        sent.ParseFromString(body)
    except DecodeError:
        raise DataError(
            "The body is no ForwardBackwardRequest in protobuf; send what the tinker client sends."
        ) from None
    if len(sent.data) > _MOST_ROWS:
        raise DataError(f"The request has {len(sent.data):,} rows; send {_MOST_ROWS:,} at most in one.")
    config: dict[str, float | str] = dict(sent.loss_fn_config)
    for name, value in sent.loss_fn_config_v2.items():
        if value.WhichOneof("value") is None:
            raise DataError(f"The loss setting {name!r} has no value; give a number or a text.")
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    for name, given in config.items():
        if isinstance(given, float) and not math.isfinite(given):
            raise DataError(f"The loss setting {name!r} is {given}; give a finite number.")
    reader = _RowReader()
    rows = [reader.row(number, datum) for number, datum in enumerate(sent.data)]
    if not sent.loss_fn:
        raise DataError("The request names no loss; give loss_fn, such as cross_entropy.")
    return ForwardRequest(sent.model_id, sent.seq_id, rows, sent.loss_fn, config, sent.forward_only)


class _RowReader:
    """Reads rows one after another, and counts what they unfold to."""

    def __init__(self) -> None:
        self._values = 0

    def row(self, number: int, datum: Any) -> "Datum":
        """Read one row; its provenance spans serve the one loss that is not offered, and are checked with it."""
        import numpy as np

        from haori.jobs.tenants.records import Datum

        where = f"Row {number} of the request"
        pieces = [self._tokens(where, chunk) for chunk in datum.model_input]
        if not pieces:
            raise DataError(f"{where} has no model_input; give its tokens.")
        if len(datum.loss_fn_inputs) > _MOST_INPUTS:
            raise DataError(f"{where} has {len(datum.loss_fn_inputs)} arrays; send {_MOST_INPUTS} at most.")
        inputs = {name: self._tensor(f"{where}, {name!r},", one) for name, one in datum.loss_fn_inputs.items()}
        return Datum(np.concatenate(pieces), inputs)

    def _tokens(self, where: str, chunk: Any) -> "np.ndarray[Any, Any]":
        import numpy as np

        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            named = {"image": "a picture", "dmel": "sound"}.get(kind, "an empty or unknown chunk")
            raise DataError(f"{where} holds {named}; this base reads text alone: send chunks of encoded text.")
        data = chunk.encoded_text.tokens
        if len(data) % 4:
            raise DataError(f"{where} has tokens of {len(data)} bytes; each takes 4 (int32, little-endian).")
        self._count(where, len(data) // 4)
        return np.frombuffer(data, "<i4").astype(np.int64)

    def _tensor(self, where: str, sent: Any) -> "np.ndarray[Any, Any]":
        import numpy as np

        if sent.dtype not in _DTYPES:
            raise DataError(f"{where} has the type {sent.dtype}; send FLOAT32 (1), INT64 (2) or INT32 (3).")
        dtype = np.dtype(_DTYPES[sent.dtype])
        shape = tuple(sent.shape)
        if len(shape) > 2 or any(size < 0 for size in shape):
            raise DataError(f"{where} has the shape {list(shape)}; send one or two dimensions.")
        kind = sent.WhichOneof("encoding")
        if kind == "sparse_csr":
            found = self._unfolded(where, sent.sparse_csr, dtype, shape)
        else:
            flat = _values(where, sent.dense, dtype)
            shape = shape or (len(flat),)
            if math.prod(shape) != len(flat):
                raise DataError(f"{where} has {len(flat)} values for the shape {list(shape)}.")
            self._count(where, len(flat))
            found = flat.reshape(shape)
        if dtype.kind == "f" and not np.isfinite(found).all():
            raise DataError(f"{where} holds NaN or infinity; give finite numbers.")
        return found

    def _unfolded(self, where: str, sent: Any, dtype: Any, shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
        """Return a sparse matrix (CSR) with its zeros."""
        import numpy as np

        if len(shape) != 2:
            raise DataError(f"{where} is sparse with the shape {list(shape)}; a sparse one has two dimensions.")
        self._count(where, math.prod(shape))
        values = _values(where, sent.values, dtype)
        starts = _values(where, sent.crow_indices, np.dtype("<i8"))
        columns = _values(where, sent.col_indices, np.dtype("<i8"))
        counts = np.diff(starts)
        fits = (
            len(starts) == shape[0] + 1 and starts[0] == 0 and (counts >= 0).all() and starts[-1] == len(values)
            and len(columns) == len(values) and ((columns >= 0) & (columns < shape[1])).all()
        )  # fmt: skip
        if not fits:
            raise DataError(f"{where} has sparse indices that do not fit {len(values)} values of shape {list(shape)}.")
        found = np.zeros(shape, dtype)
        found[np.repeat(np.arange(shape[0]), counts), columns] = values
        return found

    def _count(self, where: str, values: int) -> None:
        self._values += values
        if values > _MOST_VALUES or self._values > _MOST_ALL_VALUES:
            raise DataError(
                f"{where} unfolds to more than a request may ({_MOST_VALUES:,} values an array, {_MOST_ALL_VALUES:,} "
                "in all); send fewer rows."
            )


def _values(where: str, data: bytes, dtype: Any) -> "np.ndarray[Any, Any]":
    import numpy as np

    if len(data) % dtype.itemsize:
        raise DataError(f"{where} has {len(data)} bytes; each value takes {dtype.itemsize}.")
    return np.frombuffer(data, dtype)
