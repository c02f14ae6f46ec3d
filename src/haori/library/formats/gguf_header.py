"""Reads the header of a GGUF file with bounds on every count and length, without loading a tensor.

The file format (llama.cpp's docs/gguf.md, versions 2 and 3): `GGUF`, version, number of tensors, number of metadata
entries; each entry's key, type and value; each tensor's name, dimensions (the fastest first), type and offset; padding
to the alignment; the data. A file comes from strangers, so nothing is allocated by what it claims, and its layout must
be the one that llama.cpp demands: tensors in order, without gaps but padding, to the end of the file.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from haori.core.errors import FileFormatError

__all__ = ["GGUF_TYPES", "GgufHeader", "GgufTensor", "read_gguf_header"]

GGUF_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 28: ("F64", 1, 8), 30: ("BF16", 1, 2)}
"""Types of tensors that are read: name, values in a block, bytes of a block."""

_HEADER_LIMIT_BYTES = 16 << 20
_TENSOR_LIMIT = 100_000
_ENTRY_LIMIT = 10_000
_ARRAY_LIMIT = 1 << 16
_NAME_LIMIT = 256
_KEY_LIMIT = 1024
_KEPT = 4096  # longest array that is kept, and longest string of one
_ALIGNMENT = 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = str | int | float | bool | tuple[int | float | bool, ...] | None


class GgufTensor(NamedTuple):
    """One tensor: its type, shape (rows first, as torch has it), and byte range within the file."""

    type: int
    shape: tuple[int, ...]
    start: int
    end: int


class GgufHeader(NamedTuple):
    """A checked header; arrays of strings and long arrays are passed over, with None as their value."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of `path`.

    Raises:
        FileFormatError: It is no GGUF file, truncated, a model, or its header is oversized or inconsistent.
    """
    with path.open("rb") as file:
        return _Reader(path, file).read()


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def read(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise self.bad("it does not begin with the letters GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise self.bad(f"it is of version {version}; read are 2 and 3, in little-endian order")
        tensors, entries = int(self.number("Q")), int(self.number("Q"))
        if tensors > _TENSOR_LIMIT or entries > _ENTRY_LIMIT:
            raise self.bad(
                f"it claims {tensors:,} tensors and {entries:,} entries; at most {_TENSOR_LIMIT:,} and "
                f"{_ENTRY_LIMIT:,} are accepted"
            )
        metadata: dict[str, Value] = {}
        for _ in range(entries):
            key = self.string(_KEY_LIMIT)
            if key in metadata:
                raise self.bad(f"the key {key[:80]!r} is there twice")
            metadata[key] = self.value(self.number("I"))
            if metadata.get("general.type") == "model":  # whose vocabulary is not read for nothing
                break
        if metadata.get("general.type", "model") == "model":
            raise FileFormatError(
                f"{str(self.path)!r} is a GGUF model, not an adapter; use it as a base, as in `--base {self.path}`."
            )
        return GgufHeader(metadata, self.tensors(tensors, metadata.get("general.alignment", _ALIGNMENT)))

    def tensors(self, count: int, alignment: Value) -> dict[str, GgufTensor]:
        """Read the tensors' entries and check that they lie one after the other, to the end of the file."""
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self.bad(f"its alignment is {str(alignment)[:40]}, not a power of two from 8 to 65,536")
        found = [self.entry() for _ in range(count)]
        first = position = _padded(self.file.tell(), alignment)
        tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in found:
            if name in tensors:
                raise self.bad(f"the tensor {name[:80]!r} is there twice")
            if first + offset != position:
                raise self.bad(f"the tensor {name[:80]!r} overlaps another or leaves a gap")
            _, block, size = GGUF_TYPES[kind]
            end = position + math.prod(shape) // block * size
            if end > self.size:
                raise self.bad(f"it is {self.size:,} bytes long and {name[:80]!r} ends at {end:,}: it is truncated")
            tensors[name] = GgufTensor(kind, shape, position, end)
            position = _padded(end, alignment)
        if tensors and self.size > position:
            raise self.bad(f"{self.size - position:,} bytes follow the last tensor")
        return tensors

    def entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string(_NAME_LIMIT)
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.bad(f"the tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(int(dimensions)))[::-1]
        kind, offset = int(self.number("I")), int(self.number("Q"))
        if kind not in GGUF_TYPES:
            allowed = ", ".join(name for name, *_ in GGUF_TYPES.values())
            raise self.bad(f"the tensor {name[:80]!r} is of type {kind}; read are {allowed}")
        if not all(1 <= side < 1 << 40 for side in shape) or shape[-1] % GGUF_TYPES[kind][1]:
            raise self.bad(f"the tensor {name[:80]!r} has the impossible shape {list(shape)}")
        return name, kind, shape, offset

    def value(self, kind: float) -> Value:
        if kind == _STRING:
            return self.string(_HEADER_LIMIT_BYTES)
        if kind in _NUMBERS:
            return self.number(_NUMBERS[int(kind)])
        if kind != _ARRAY:
            raise self.bad(f"an entry is of the unknown type {kind}")
        inner, count = self.number("I"), int(self.number("Q"))
        if count > _ARRAY_LIMIT or (inner not in _NUMBERS and inner != _STRING):
            raise self.bad(f"an entry is an array of {count:,} values of type {inner}, as no adapter has")
        if inner == _STRING:
            for _ in range(count):
                self.string(_HEADER_LIMIT_BYTES)
            return None
        code = f"<{count}{_NUMBERS[int(inner)]}"
        raw = self.take(struct.calcsize(code))
        return struct.unpack(code, raw) if count <= _KEPT else None

    def string(self, limit: int) -> str:
        length = int(self.number("Q"))
        if length > limit:
            raise self.bad(f"a text in its header claims {length:,} bytes; at most {limit:,} are accepted")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.bad("a text in its header is not UTF-8") from None

    def number(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        return value

    def take(self, count: int) -> bytes:
        if self.file.tell() + count > min(self.size, _HEADER_LIMIT_BYTES):
            if self.size > _HEADER_LIMIT_BYTES:
                raise self.bad(f"its header is longer than {_HEADER_LIMIT_BYTES:,} bytes")
            raise self.bad(f"it ends after {self.size:,} bytes, inside its header: it is truncated")
        found = self.file.read(count)
        if len(found) < count:
            raise self.bad("it was cut off while it was read")
        return found

    def bad(self, reason: str) -> FileFormatError:
        return FileFormatError(f"{str(self.path)!r} cannot be read as GGUF: {reason}.")


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
