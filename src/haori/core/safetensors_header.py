"""Reads the header of a safetensors file without loading a tensor and without torch.

The file format: 8 bytes little-endian header length N, N bytes of JSON that map a tensor name to
`{dtype, shape, data_offsets}` (offsets relative to the end of the header) and optionally `__metadata__` to
strings, then the data. A header comes from strangers, so sizes, bounds, overlaps and types are checked before
anything else reads the file.
"""

import json
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from haori.core.errors import FileFormatError

__all__ = ["HEADER_LIMIT_BYTES", "SafetensorsHeader", "TensorEntry", "read_safetensors_header"]

HEADER_LIMIT_BYTES = 16 << 20
_TENSOR_LIMIT = 200_000
_MARK_LIMITS = {b"{": 2 * _TENSOR_LIMIT, b"[": 4 * _TENSOR_LIMIT, b'":': 6 * _TENSOR_LIMIT, b",": 12 * _TENSOR_LIMIT}
_RANK_LIMIT = 16
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class TensorEntry(NamedTuple):
    """One tensor: dtype as safetensors spells it, shape, and byte range within the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsHeader(NamedTuple):
    """A checked header."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of `path`.

    Raises:
        FileFormatError: The file is not safetensors, is truncated, or its header is oversized or inconsistent.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(9)
        length = int.from_bytes(first[:8], "little")
        if first[8:] != b"{" or length > HEADER_LIMIT_BYTES:
            _refuse_other_formats(path, first)
        if len(first) < 8:
            raise _bad(path, f"it is {size} bytes long, too short for a header")
        if length > HEADER_LIMIT_BYTES:
            raise _bad(path, f"its header claims {length:,} bytes; at most {HEADER_LIMIT_BYTES:,} are accepted")
        file.seek(8)
        raw = file.read(length)
    if len(raw) < length:
        raise _bad(path, f"it ends after {size:,} bytes, inside its header: the file is truncated")
    for mark, limit in _MARK_LIMITS.items():  # counted first: JSON of 16 MB can become objects of 400 MB
        if raw.count(mark) > limit:
            raise _bad(path, f"its header has more than {limit:,} times {mark.decode()!r}")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise _bad(path, f"its header has the key {str(error)[:80]!r} twice, so it says two things") from None
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON in UTF-8") from None
    if not isinstance(document, dict):
        raise _bad(path, "its header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "its metadata is not a table of strings")
    if len(document) > _TENSOR_LIMIT:
        raise _bad(path, f"it lists {len(document):,} tensors; at most {_TENSOR_LIMIT:,} are accepted")
    tensors = {name: _entry(path, name, value) for name, value in document.items()}
    _check_layout(path, tensors, size - 8 - length)
    return SafetensorsHeader(tensors, metadata, 8 + length)


class _RepeatedKeyError(Exception):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _refuse_other_formats(path: Path, first: bytes) -> None:
    """Name what a file is that does not begin like safetensors.

    First bytes alone decide nothing: a header of 640, 896, 1,152 or 1,408 bytes (and every 65,536 more) begins like a
    pickle. But no pickle, zip or GGUF file has both a small number in its first 8 bytes and a brace behind them.
    """
    if first[:4] == b"GGUF":
        raise _bad(path, "it is a GGUF file; give such a file itself as the base, under a name that ends in .gguf")
    kind = None
    if first[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        kind = "a Python pickle"
    elif first[:4] == b"PK\x03\x04":
        kind = "a zip archive (a PyTorch pickle checkpoint, most likely)"
    if kind:
        raise _bad(
            path,
            f"it is {kind}; pickles can run code, so only safetensors is read. Convert it with `haori library "
            f"convert-pickle {shlex.quote(str(path))} --out NEW.safetensors`, which reads nothing but tensors, in a "
            "process of its own",
        )


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"the entry of tensor {name[:80]!r} is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _bad(path, f"tensor {name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise _bad(path, f"tensor {name[:80]!r} has an invalid shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name[:80]!r} has invalid offsets")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _bad(path, f"tensor {name[:80]!r} of shape {shape} and dtype {dtype} does not fill its byte range")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: dict[str, TensorEntry], data_bytes: int) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            raise _bad(path, f"tensor {name[:80]!r} overlaps another")
        if entry.start > position:
            raise _bad(path, f"there is a gap before tensor {name[:80]!r}")
        position = entry.end
    if position > data_bytes:
        raise _bad(path, f"it holds {data_bytes:,} of {position:,} bytes of data: the file is truncated")
    if position < data_bytes:
        raise _bad(path, f"{data_bytes - position:,} bytes follow the last tensor")


def _bad(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(f"{str(path)!r} cannot be read as safetensors: {reason}.")
