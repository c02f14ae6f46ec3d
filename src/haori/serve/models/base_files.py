"""The weights of a base on disk, read one by one, under the names that its model gives them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["BaseFiles", "names_in_files"]


class BaseFiles:
    """The weights of a base on disk, and which of its modules take which changes.

    Args:
        folder: The base's folder.
        linears: (D_out, D_in) of each linear module that takes updates, by its name.
        names: The name in the files of each parameter of the model; by default the files name them as the model does.
        transposed: Linear modules whose weight is stored (D_in, D_out), as those of GPT-2 are.
        tables: Parameters whose rows belong to tokens: the embedding and the output head.
        head: The output head, if it takes low-rank updates too.
    """

    def __init__(
        self,
        folder: Path,
        linears: dict[str, tuple[int, int]],
        *,
        names: Mapping[str, str] | None = None,
        transposed: Collection[str] = (),
        tables: Collection[str] = (),
        head: str | None = None,
    ) -> None:
        self._linears, self._head = linears, head
        self._open: dict[Path, Any] = {}  # DoRA reads every weight it changes
        self._file_of = _files(folder)
        self._names = {name: name for name in self._file_of} if names is None else names
        self._transposed = frozenset(transposed)
        self.tables = frozenset(tables)

    @property
    def names(self) -> Collection[str]:
        """Full names of all parameters, that of a tied output head included."""
        return self._names.keys()

    @property
    def are_there(self) -> bool:
        """Whether the files hold all of them."""
        return self._file_of.keys() >= set(self._names.values())

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return (D_out, D_in) of a linear module that takes updates."""
        if name == self._head:
            rows, width = self.tensor(f"{name}.weight").shape
            return rows, width
        return self._linears.get(name)

    def weight(self, module: str) -> Tensor:
        """Return the weight (D_out, D_in) of a linear module."""
        weight = self.tensor(f"{module}.weight")
        return weight.T if module in self._transposed else weight

    def tensor(self, name: str) -> Tensor:
        """Read one parameter; its numbers may lie in the file itself, so it must not be written to."""
        from safetensors import safe_open

        stored = self._names[name]
        path = self._file_of[stored]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(stored)
        return tensor


def names_in_files(model: Any, folder: Path) -> dict[str, str]:
    """Return under which name the files hold each parameter of a model; what they hold otherwise is left out.

    Files may lack the prefix of the model's body, as those of GPT-2 do, and hold tied weights once.
    """
    stored = _files(folder).keys()
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    by_address: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = next((candidate for candidate in (name, name.removeprefix(prefix)) if candidate in stored), None)
        if own is not None:
            found[name] = own
            by_address[parameter.data_ptr()] = own
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in found and parameter.data_ptr() in by_address:
            found[name] = by_address[parameter.data_ptr()]
    return found


def _files(folder: Path) -> dict[str, Path]:
    from haori.core.safetensors_header import read_safetensors_header

    return {
        name: path for path in sorted(folder.glob("*.safetensors")) for name in read_safetensors_header(path).tensors
    }
