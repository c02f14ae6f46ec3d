"""Where each tensor of a base lies in its files, and reading one of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haori.bases.pipeline import read_base_folder
from haori.core.errors import BaseError
from haori.core.safetensors_header import SafetensorsHeader, TensorEntry, read_safetensors_header
from haori.library.fit import BaseWeight, component_weights

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.bases.folder import ModelFolder

__all__ = ["DTYPES", "BaseTensors", "WeightFile", "read_tensor"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""The dtypes of weights that can be computed with, as safetensors spells them."""


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file with its header."""

    path: Path
    header: SafetensorsHeader

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            BaseError: It is of a dtype that is no weight's.
        """
        entry = self.header.tensors[name]
        with self.path.open("rb") as file:
            return read_tensor(file.fileno(), self.header.data_start, entry, name)


def read_tensor(descriptor: int, data_start: int, entry: TensorEntry, name: str, into: Tensor | None = None) -> Tensor:
    """Read a tensor, in its own dtype, from an open file.

    Args:
        descriptor: Of the file; where it stands is of no account, so several threads may read.
        data_start: Where the data of the file begin.
        entry: Dtype, shape and byte range.
        name: For messages.
        into: Bytes to read into, at least as many; new ones by default.

    Raises:
        BaseError: It is of a dtype that is no weight's, or the file is too short.
    """
    if entry.dtype not in DTYPES:
        raise BaseError(
            f"The weight {name!r} is stored as {entry.dtype}, whose steps are too coarse to compute with; use the base "
            "in 16 or 32 bits."
        )
    size = entry.end - entry.start
    data = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
    array: Any = data.numpy()
    view = memoryview(array)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], data_start + entry.start + done)
        if count == 0:
            raise BaseError(f"The file of the weight {name!r} is shorter than its header says.")
        done += count
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


class BaseTensors:
    """The weights of a base by component and by the name that its files give them; only headers are in memory.

    Args:
        base: The base.
    """

    def __init__(self, base: "Base") -> None:
        self.base = base
        self.folders: Mapping[str, ModelFolder] = read_base_folder(base.path).models

    @cached_property
    def files(self) -> Mapping[str, tuple[WeightFile, ...]]:
        """Return the weight files of each component."""
        return {
            name: tuple(WeightFile(path, read_safetensors_header(path)) for path in folder.weight_files)
            for name, folder in self.folders.items()
        }

    @cached_property
    def weights(self) -> dict[str, dict[str, BaseWeight]]:
        """Return the weights by component and canonical name, as `match` takes them."""
        return {name: component_weights(folder) for name, folder in self.folders.items()}

    def file_of(self, component: str, name: str) -> WeightFile:
        """Return the file that holds a tensor."""
        return next(file for file in self.files[component] if name in file.header.tensors)

    def read(self, component: str, weight: BaseWeight) -> Tensor:
        """Read a weight in its own dtype.

        Raises:
            BaseError: It is of a dtype that is no weight's.
        """
        return self.file_of(component, weight.name).read(weight.name)
