"""Writes a safetensors file in one step, with hashes of its own bytes in its header where a format has them there.

Tensors go to the disk one after another, from where they are: no second copy of them is made.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.storage import staged_file
from haori.library.file_hashes import WeightHashes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_hashed", "write_tensors"]

_ALIGNMENT = 8
_HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8, "modelspec.hash_sha256": 66}
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it and rename it.

    Args:
        path: What is there is replaced.
        tensors: Of any layout; those that share memory, as parts of one fused layer do, are written in full each.
        metadata: The header's strings.

    Raises:
        StorageError: It cannot be written.
    """
    with staged_file(path) as stage, stage.open("wb") as file:
        ordered = _ordered(tensors)
        file.write(_header(ordered, metadata))
        for data in _bytes_of(ordered):
            file.write(data)


def write_hashed(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as `write_tensors` does, with the hashes of kohya and ModelSpec in its header.

    `sshs_model_hash` and `modelspec.hash_sha256` are of the bytes after the header. `sshs_legacy_hash` is AutoV1 of the
    file as it is; that of sd-scripts is of the same bytes under a shorter header, and so agrees with no file.
    """
    blank = {**metadata, **{key: "0" * digits for key, digits in _HASHES.items()}}
    with staged_file(path) as stage, stage.open("wb") as file:
        ordered = _ordered(tensors)
        header = _header(ordered, blank)
        hashes = WeightHashes(len(header))
        file.write(header)
        for data in _bytes_of(ordered):
            hashes.update(data)
            file.write(data)
        whole, legacy = hashes.whole(), hashes.legacy()
        found = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{whole}"}
        file.seek(0)
        file.write(_header(ordered, {**blank, **found}))


def _ordered(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the tensors as safetensors orders them, the widest values first, so that each lies aligned."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _header(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensors: "Mapping[str, Tensor]") -> Iterator[memoryview]:
    import torch

    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
