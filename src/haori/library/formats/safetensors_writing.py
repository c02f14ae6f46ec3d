"""Writes a safetensors file in one step, with hashes of its own bytes in its header where a format has them there."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.storage import explain_os_errors
from haori.library.file_hashes import hash_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_hashed", "write_tensors"]

_ALIGNMENT = 8
_HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8, "modelspec.hash_sha256": 66}


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it and rename it.

    Args:
        path: What is there is replaced.
        tensors: Of any layout; those that share memory, as parts of one fused layer do, are written in full each.
        metadata: The header's strings.

    Raises:
        StorageError: It cannot be written.
    """
    from safetensors.torch import save

    _replace(path, save(_apart(tensors), dict(metadata)))


def write_hashed(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as `write_tensors` does, with the hashes of kohya and ModelSpec in its header.

    `sshs_model_hash` and `modelspec.hash_sha256` are of the bytes after the header. `sshs_legacy_hash` is AutoV1 of the
    file as it is; that of sd-scripts is of the same bytes under a shorter header, and so agrees with no file.
    """
    from safetensors.torch import save

    plain = save(_apart(tensors))
    length = int.from_bytes(plain[:8], "little")
    entries, data = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    blank = {**metadata, **{key: "0" * digits for key, digits in _HASHES.items()}}
    whole, legacy = hash_weights(_header(entries, blank), data)
    hashes = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{whole}"}
    _replace(path, _header(entries, {**blank, **hashes}), data)


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.detach().contiguous() if place not in seen else tensor.detach().clone().contiguous()
        seen.add(place)
    return found


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _replace(path: Path, *parts: bytes) -> None:
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
