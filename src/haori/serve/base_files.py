"""The weights of a base on disk, read one by one."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["BaseFiles"]


class BaseFiles:
    """The weights of a base on disk, and which of its linear layers take updates.

    Args:
        folder: The base's folder.
        linears: (D_out, D_in) of each linear module that takes updates, by its name.
    """

    def __init__(self, folder: Path, linears: dict[str, tuple[int, int]]) -> None:
        from haori.core.safetensors_header import read_safetensors_header

        self._linears = linears
        self._open: dict[Path, Any] = {}  # DoRA reads every weight it changes
        self._file_of = {
            name: path
            for path in sorted(folder.glob("*.safetensors"))
            for name in read_safetensors_header(path).tensors
        }

    @property
    def names(self) -> Collection[str]:
        """Full names of all parameters."""
        return self._file_of.keys()

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return (D_out, D_in) of a linear module that takes updates."""
        return self._linears.get(name)

    def tensor(self, name: str) -> Tensor:
        """Read one parameter; its numbers may lie in the file itself, so it must not be written to."""
        from safetensors import safe_open

        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor
