"""Reads the configurations of a diffusers pipeline: its parts, their classes, and each part's settings. No weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.bases.base import Base
from haori.bases.folder import read_json
from haori.bases.pipeline import PIPELINE_INDEX, needed_parts
from haori.core.errors import BaseError

__all__ = ["Part", "PipelineConfigs", "read_configs"]

_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Part:
    """One part of a pipeline: the library and class that read it, its folder, and its settings."""

    library: str
    kind: str
    path: Path
    config: Mapping[str, Any]


@dataclass(frozen=True)
class PipelineConfigs:
    """What the files of a pipeline say of it.

    Attributes:
        base: Name of the base, for messages.
        pipeline: Class of the pipeline.
        index: The whole of model_index.json, with settings of the pipeline such as `is_distilled`.
        parts: Its parts by name; one that was left out is not among them.
    """

    base: str
    pipeline: str
    index: Mapping[str, Any]
    parts: Mapping[str, Part]

    def part(self, name: str) -> Part:
        """Return a part by name.

        Raises:
            BaseError: The pipeline lacks it.
        """
        if name not in self.parts:
            raise BaseError(
                f"The base {self.base!r} ({self.pipeline}) lacks its part {name!r}; it has "
                f"{', '.join(sorted(self.parts)) or 'none'}. Fetch the whole pipeline again."
            )
        return self.parts[name]


def read_configs(base: Base) -> PipelineConfigs:
    """Read what the files of a base's pipeline say.

    Raises:
        BaseError: The base is one model, no pipeline.
        FileFormatError: A file is malformed.
    """
    if base.pipeline is None:
        raise BaseError(
            f"The base {base.name!r} is one model ({base.fingerprint.architecture}), no pipeline for pictures; give a "
            "text-to-image pipeline in the layout of diffusers."
        )
    index = read_json(base.path / PIPELINE_INDEX)
    parts = {}
    for name, (library, kind) in needed_parts(index).items():
        path = base.path / name
        file = next((path / file for file in _FILES if (path / file).is_file()), None)
        parts[name] = Part(library, kind, path, read_json(file) if file is not None else {})
    return PipelineConfigs(base.name, base.pipeline, index, parts)
