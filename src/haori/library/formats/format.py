"""What a format is, and the opened file that it looks at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from haori.core.errors import FileFormatError
from haori.core.safetensors_header import TensorEntry, read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard
    from haori.library.updates import AdapterUpdates

__all__ = ["SINGLE_FILE", "Format", "Source", "open_source"]

SINGLE_FILE = "adapter.safetensors"
"""What the library calls the weights of an adapter that came as one file; the bytes are as they came."""


@dataclass(frozen=True)
class Source:
    """An adapter's file, or folder of files, of which only the header was read.

    Attributes:
        path: A folder as PEFT writes it, a safetensors file or a GGUF file.
        tensors: Name, dtype and shape of every tensor of a safetensors file; empty for the others.
        metadata: The header metadata of a safetensors file.
        base_config: The config.json of the base, where it is known. Some files cannot be read without it: GGUF keeps
            the rows of attention weights in another order, which depends on the number of heads.
    """

    path: Path
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_config: Mapping[str, Any] | None = None

    def load(self) -> "dict[str, Tensor]":
        """Read all tensors of a safetensors file.

        Raises:
            FileFormatError: It changed since its header was read, or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(self.path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise FileFormatError(f"{str(self.path)!r} cannot be read as safetensors: {reason}.") from None
        if tensors.keys() != self.tensors.keys():
            raise FileFormatError(f"{str(self.path)!r} was changed while it was read; read it again.")
        return tensors


class Format(Protocol):
    """One file format: `formats/registry.py` names them, and nothing else of the library does."""

    name: str
    """What a command and a card call it, such as `kohya`."""

    title: str
    """What it is, in a few words, for tables and messages."""

    def detect(self, source: Source) -> bool:
        """Say whether the file is of this format, by the names and shapes in its header."""

    def read(self, source: Source) -> "AdapterUpdates":
        """Read the file into the neutral form.

        Raises:
            FileFormatError: A key is neither used nor known to say nothing, and is named; or tensors do not fit.
        """

    def write(
        self,
        updates: "AdapterUpdates",
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the neutral form to a new file or folder.

        Args:
            updates: What to write.
            path: Where; what is there is replaced, by one rename.
            card: What is known about the adapter, for the metadata of formats that have any.
            base_config: The config.json of the base. GGUF cannot be written without it; others may pass over it.

        Raises:
            InputError: The format cannot represent it; the reason and the way round are named.
        """


def open_source(path: Path, base_config: Mapping[str, Any] | None = None) -> Source:
    """Open an adapter's file or folder and read its header, nothing more.

    A folder of the library that holds an adapter of one file is opened as that file.

    Args:
        path: The file or folder.
        base_config: The config.json of its base, where it is known.

    Raises:
        FileFormatError: It is missing, malformed, or of a kind that is never read, such as a pickle.
    """
    if (path / SINGLE_FILE).is_file():
        path /= SINGLE_FILE
    if path.is_dir():
        return Source(path, base_config=base_config)
    if not path.is_file():
        raise FileFormatError(f"There is no file {str(path)!r}.")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return Source(path, base_config=base_config)
    header = read_safetensors_header(path)
    return Source(path, header.tensors, header.metadata, base_config)
