"""Checks every value of a weight file, in bounded memory, before anything is built from it.

The header is checked first (`core/safetensors_header.py`, `formats/gguf_header.py`): its length, offsets, dtypes,
shapes, repeated keys. Ranks and the fit of factors are checked where they are put together (`update_shapes.py`), and
shapes against a base in `fit.py`. Here the numbers themselves are read, a few megabytes at a time.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import FileFormatError
from haori.core.progress_bar import progress_bar
from haori.core.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST_RMS", "LARGEST_VALUE", "validate_tensors"]

LARGEST_VALUE = 65_504.0
"""Of float16: a base in half precision cannot take a larger one, and only a training that diverged makes it."""

LARGEST_RMS = 1_000.0
"""Root mean square of a tensor of several values. Factors have 1e-4 to 10, magnitudes and norms up to a few hundred."""

_CHUNK_BYTES = 4 << 20
_SHOWN_FROM_BYTES = 1 << 30  # about a second
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_WHOLE = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


class _Stretch(NamedTuple):
    name: str
    dtype: str
    start: int
    end: int


def validate_tensors(path: Path) -> None:
    """Read every value of a safetensors or GGUF file and refuse what no trained adapter holds.

    Args:
        path: The file; it is read once, 4 MiB at a time.

    Raises:
        FileFormatError: Its header is wrong; a tensor holds NaN or infinity, a value above 65,504 or a root mean
            square above 1,000; or it is of a dtype that is no number by itself. The tensor is named.
    """
    stretches = _stretches(path)
    total = sum(stretch.end - stretch.start for stretch in stretches)
    if total < _SHOWN_FROM_BYTES:
        for stretch in stretches:
            _check(path, stretch)
        return
    with progress_bar("Checking values", total, "bytes") as advance:
        for stretch in stretches:
            _check(path, stretch)
            advance(stretch.end - stretch.start)


def _stretches(path: Path) -> list[_Stretch]:
    if not path.is_file():
        raise FileFormatError(f"There is no file {str(path)!r}.")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        from haori.library.formats.gguf_header import GGUF_TYPES, read_gguf_header

        tensors = read_gguf_header(path).tensors
        return [_Stretch(name, GGUF_TYPES[t.type][0], t.start, t.end) for name, t in tensors.items()]
    header = read_safetensors_header(path)
    at = header.data_start
    return [_Stretch(name, t.dtype, at + t.start, at + t.end) for name, t in header.tensors.items()]


def _check(path: Path, stretch: _Stretch) -> None:
    name, dtype = stretch.name[:120], stretch.dtype
    if dtype in _WHOLE:
        return
    if dtype not in _DTYPES and dtype != "Q8_0":
        raise FileFormatError(
            f"The tensor {name!r} in {str(path)!r} is of dtype {dtype}, which is no number by itself."
        )
    import torch

    count, squares = 0, 0.0
    for values in _chunks(path, stretch):
        low, high = torch.aminmax(values)  # NaN if there is any
        largest = max(abs(float(low)), abs(float(high))) if bool(low <= high) else math.nan
        if not math.isfinite(largest):
            raise FileFormatError(
                f"The tensor {name!r} in {str(path)!r} holds NaN or infinity; its training diverged, or the file is "
                "damaged. Take an earlier checkpoint."
            )
        if largest > LARGEST_VALUE:
            raise FileFormatError(
                f"The tensor {name!r} in {str(path)!r} holds a value of {largest:.3g}; more than {LARGEST_VALUE:,.0f} "
                "does not fit into float16, and only a training that diverged makes it. Take an earlier checkpoint."
            )
        squares += float(torch.linalg.vector_norm(values)) ** 2
        count += values.numel()
    if count > 1 and math.sqrt(squares / count) > LARGEST_RMS:
        raise FileFormatError(
            f"The values of the tensor {name!r} in {str(path)!r} have a root mean square of "
            f"{math.sqrt(squares / count):,.0f}; trained tensors have less than {LARGEST_RMS:,.0f}. Its training "
            "diverged; take an earlier checkpoint."
        )


def _chunks(path: Path, stretch: _Stretch) -> "Iterator[Tensor]":
    """Yield the values of a tensor in float32, or in float64 where it is kept in that."""
    import numpy as np
    import torch

    step = _CHUNK_BYTES // 34 * 34 if stretch.dtype == "Q8_0" else _CHUNK_BYTES
    with path.open("rb") as file:
        file.seek(stretch.start)
        left = stretch.end - stretch.start
        while left:
            raw = bytearray(file.read(min(step, left)))
            if len(raw) < min(step, left):
                raise FileFormatError(f"{str(path)!r} was cut off while it was read; read it again.")
            left -= len(raw)
            if stretch.dtype == "Q8_0":  # a scale in float16 and 32 values of 8 bits
                scales = np.frombuffer(raw, np.uint8).reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)
                yield torch.from_numpy(scales * 127)
                continue
            values = torch.frombuffer(raw, dtype=getattr(torch, _DTYPES[stretch.dtype]))
            yield values if values.dtype == torch.float64 else values.float()
