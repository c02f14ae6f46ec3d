"""What is known about a base model once it has been found: plain data, no weights in memory.

A base consists of named components. One for text has a single one, `model`; a diffusers pipeline has those that its
model_index.json names, such as `unet`, `vae` and `text_encoder`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from haori.core.records import BaseReference, CheckpointHashes, Fingerprint, only_component

__all__ = ["Base", "BaseEntry", "Component"]


@dataclass(frozen=True)
class Component:
    """One model of a base.

    Attributes:
        name: `model` for a base that is one model, else what the pipeline calls it.
        path: Its folder, with config.json and safetensors weights.
        fingerprint: Identity by content.
        size_bytes: Size of the weight files.
        parameters: Number of weights in them.
        context_length: Longest input in tokens; means nothing for a component that reads no text.
        quantization: How the weights are quantised, or None for 16 or 32 bits.
    """

    name: str
    path: Path
    fingerprint: Fingerprint
    size_bytes: int
    parameters: int
    context_length: int
    quantization: str | None

    @property
    def architecture(self) -> str:
        """Return the class that its configuration names."""
        return self.fingerprint.architecture


@dataclass(frozen=True)
class Base:
    """A base model on this machine, ready to be loaded.

    What only a single model has (`fingerprint`, `context_length`) is refused with a sentence by a base of several
    components.

    Attributes:
        name: The name shown to people.
        path: Its folder, in the layout of transformers or of diffusers, with safetensors weights.
        source: Where it came from, as `folder:/x`, `hub:org/name`, `wheel:name==1.0`, `gguf:/x.gguf` or
            `embedded:name`.
        revision: Commit of a hub model.
        components: Its models by name.
        licence: SPDX id or expression where it is known.
        pipeline: Class of the diffusers pipeline that the components make up; None for a base that is one model.
        checkpoint: Hashes of the single file that it was converted from; None where it was no checkpoint.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    components: Mapping[str, Component]
    licence: str | None
    pipeline: str | None = None
    checkpoint: CheckpointHashes | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of its only component.

        Raises:
            BaseError: It has several.
        """
        return only_component(self.name, self.components).fingerprint

    @property
    def context_length(self) -> int:
        """Return the longest input of its only component in tokens.

        Raises:
            BaseError: It has several.
        """
        return only_component(self.name, self.components).context_length

    @property
    def size_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum(component.size_bytes for component in self.components.values())

    @property
    def parameters(self) -> int:
        """Return the number of weights in all files."""
        return sum(component.parameters for component in self.components.values())

    @property
    def quantization(self) -> str | None:
        """Return how the weights are quantised, by component where there are several; None for 16 or 32 bits."""
        found = {name: part.quantization for name, part in self.components.items() if part.quantization is not None}
        if len(self.components) == 1:
            return next(iter(found.values()), None)
        return ", ".join(f"{name} {how}" for name, how in found.items()) or None

    @property
    def id(self) -> str:
        """Return the 12 digits shown to people."""
        return self.reference().id

    def reference(self) -> BaseReference:
        """Return the record that an adapter's card keeps."""
        return BaseReference(
            name=self.name,
            source=self.source,
            revision=self.revision,
            components={name: component.fingerprint for name, component in self.components.items()},
            checkpoint=self.checkpoint,
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
