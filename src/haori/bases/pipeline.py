"""Reads the folder of a base: one model, or a diffusers pipeline of several, without loading weights.

A pipeline's model_index.json names its parts. Those with weights become components (`unet`, `vae`, `text_encoder`);
tokenizers, schedulers and image processors only say how the components are used.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.bases.base import Component
from haori.bases.fingerprint import fingerprint_folder
from haori.bases.folder import (
    ModelFolder,
    indexed_files,
    model_of,
    no_weights,
    read_configuration,
    read_json,
    read_model_folder,
)
from haori.core.errors import BaseError, FileFormatError
from haori.core.records import MODEL_COMPONENT

__all__ = ["PIPELINE_INDEX", "BaseFolder", "needed_parts", "read_base_folder", "weights_variant"]

PIPELINE_INDEX = "model_index.json"
# Names of weight files: those of a transformers component and of one of diffusers.
_STEMS = ("model", "diffusion_pytorch_model")
_SHARD = re.compile(r"\d{5}-of-\d{5}")
# They look at finished pictures, or at pictures given beside the text; nothing here runs them.
_NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "ProcessorFast", "FeatureExtractor")


@dataclass(frozen=True)
class BaseFolder:
    """The facts of a base's folder: its models by component, and the pipeline they make up, if they do."""

    models: dict[str, ModelFolder]
    pipeline: str | None

    @property
    def size_bytes(self) -> int:
        """Return the size of all weight files."""
        return sum(model.size_bytes for model in self.models.values())

    @property
    def parameters(self) -> int:
        """Return the number of weights in all files."""
        return sum(model.parameters for model in self.models.values())

    def components(self) -> dict[str, Component]:
        """Return the components with their fingerprints; this reads every weight file once."""
        found = {}
        for name, model in self.models.items():
            # text_encoder_2 reads what tokenizer_2 writes.
            beside = model.path.parent / name.replace("text_encoder", "tokenizer")
            reads_text = self.pipeline is not None and beside != model.path
            found[name] = Component(
                name=name,
                path=model.path,
                fingerprint=fingerprint_folder(model, tokenizer=beside if reads_text else model.path),
                size_bytes=model.size_bytes,
                parameters=model.parameters,
                context_length=model.context_length,
                quantization=model.quantization,
            )
        return found


def read_base_folder(path: Path) -> BaseFolder:
    """Read and check the folder of a base.

    Raises:
        BaseError: It is neither a model nor a pipeline, or not one that can be used.
        FileFormatError: One of its files is truncated, malformed or unsafe.
    """
    if (path / "config.json").is_file() or not (path / PIPELINE_INDEX).is_file():
        return BaseFolder({MODEL_COMPONENT: read_model_folder(path)}, None)
    index = read_json(path / PIPELINE_INDEX)
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list):
        raise BaseError(_own_code(path, f"the pipeline {str(pipeline[-1:])[1:-1]}"))
    if not isinstance(pipeline, str):
        raise FileFormatError(f"{str(path / PIPELINE_INDEX)!r} names no pipeline; expected '_class_name': '...'.")
    models = {name: _read_component(path / name) for name in _with_weights(path, index)}
    if not models:
        raise BaseError(f"The pipeline in {str(path)!r} has no component with weights.")
    return BaseFolder(models, pipeline)


def needed_parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the parts that a pipeline's index names, with library and class; those left out are not among them."""
    # Settings of the pipeline are no pairs; a part that was left out is a pair of nulls.
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in sorted(index.items())
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
        and name not in _NOT_NEEDED
    }  # fmt: skip


def _with_weights(path: Path, index: dict[str, Any]) -> list[str]:
    """Return the names of the parts that hold weights."""
    found = []
    for name, (library, kind) in needed_parts(index).items():
        if Path(name).name != name or name == "..":
            raise FileFormatError(f"{str(path / PIPELINE_INDEX)!r} names the part {name[:80]!r}, which is not allowed.")
        if (path / name / f"{library}.py").is_file() or (path / f"{library}.py").is_file():
            raise BaseError(_own_code(path, f"its component {name!r}"))
        if not (path / name).is_dir():
            raise BaseError(
                f"The pipeline in {str(path)!r} lacks its part {name!r} ({kind}): there is no folder of that name; "
                "fetch the whole pipeline again."
            )
        if not kind.endswith(_WITHOUT_WEIGHTS):
            found.append(name)
    return found


def _read_component(path: Path) -> ModelFolder:
    config = read_configuration(path)
    architectures: Any = config.get("architectures")
    named = architectures[:1] if isinstance(architectures, list) else [config.get("_class_name")]
    if not named or not isinstance(named[0], str):
        raise BaseError(f"{str(path / 'config.json')!r} names no class; expected '_class_name' or 'architectures'.")
    return model_of(path, config, named[0], _weight_files(path))


def _weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that hold the weights of a component, as transformers and diffusers would choose them.

    Where there are no weights without a variant such as fp16, those of the only variant are taken.
    """
    for stem in _STEMS:
        if (path / f"{stem}.safetensors").is_file():
            return (path / f"{stem}.safetensors",)
        if (path / f"{stem}.safetensors.index.json").is_file():
            return indexed_files(path, path / f"{stem}.safetensors.index.json")
    variants = _variants(path)
    if len(variants) > 1:
        raise BaseError(
            f"{str(path)!r} holds its weights only as the variants {', '.join(sorted(variants))}; keep one of them, or "
            "add the weights without a variant."
        )
    for file in variants.values():
        return indexed_files(path, file) if file.suffix == ".json" else (file,)
    raise BaseError(no_weights(path, " or ".join(f"{stem}.safetensors" for stem in reversed(_STEMS))))


def weights_variant(path: Path) -> str | None:
    """Return the variant, such as `fp16`, of the weights that are taken from a component's folder; None for none."""
    plain = [f"{stem}.safetensors{end}" for stem in _STEMS for end in ("", ".index.json")]
    if any((path / name).is_file() for name in plain):
        return None
    return next(iter(_variants(path)), None)


def _variants(path: Path) -> dict[str, Path]:
    """Return the weights by variant: one file, or the index of several."""
    found = {}
    for stem in _STEMS:
        for file in sorted(path.glob(f"{stem}.*.safetensors")):
            variant = file.name.removeprefix(f"{stem}.").removesuffix(".safetensors")
            if not _SHARD.search(variant):
                found[variant] = file
        for file in sorted(path.glob(f"{stem}.safetensors.index.*.json")):
            found[file.name.removeprefix(f"{stem}.safetensors.index.").removesuffix(".json")] = file
    return found


def _own_code(path: Path, what: str) -> str:
    return (
        f"The pipeline in {str(path)!r} needs Python code of its own for {what}, and code that comes with a model is "
        "never run; choose a base whose classes diffusers and transformers have built in."
    )
