"""Tensors that can be computed again, one small file each, named by the hash of everything they were computed from.

What a changed picture, caption, model or setting gives has another name, so nothing stale is ever read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.storage import make_folder, staged_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorCache", "key_of"]

_IN_MEMORY_BYTES = 1_000_000_000


def key_of(**parts: Any) -> str:
    """Return the hash of what tensors are computed from: numbers, texts, lists and tables of them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TensorCache:
    """Reads and writes named tensors by key; what was read stays in memory up to a gigabyte.

    Args:
        folder: Where the files are; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}
        self._held_bytes = 0

    def __contains__(self, key: str) -> bool:
        """Say whether a key is in memory or on disk."""
        return key in self._held or self._path(key).is_file()

    def get(self, key: str) -> "dict[str, Tensor]":
        """Return the tensors of a key that is there."""
        from safetensors.torch import load_file

        if key in self._held:
            return self._held[key]
        found = load_file(self._path(key))
        self._hold(key, found)
        return found

    def put(self, key: str, tensors: "Mapping[str, Tensor]") -> None:
        """Write tensors; the file appears whole or not at all."""
        from safetensors.torch import save_file

        path = self._path(key)
        make_folder(path.parent)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with staged_file(path) as stage:
            save_file(kept, stage)
        self._hold(key, kept)

    def _hold(self, key: str, tensors: "dict[str, Tensor]") -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._held_bytes + size <= _IN_MEMORY_BYTES:
            self._held[key] = tensors
            self._held_bytes += size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
