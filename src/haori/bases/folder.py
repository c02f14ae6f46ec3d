"""Reads a model folder in Hugging Face layout without loading weights and without running its code.

Refused, each with a sentence: no config.json, pickled weights only, an adapter, truncated or missing safetensors
files, and models that bring their own Python code.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haori.core.errors import BaseError, FileFormatError
from haori.core.safetensors_header import read_safetensors_header

__all__ = [
    "ModelFolder",
    "indexed_files",
    "model_of",
    "no_weights",
    "read_configuration",
    "read_json",
    "read_model_folder",
]

_INDEX = "model.safetensors.index.json"
_JSON_LIMIT_BYTES = 256 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ModelFolder:
    """The facts of a model folder; `tensors` maps each weight's name to its shape."""

    path: Path
    config: dict[str, Any]
    architecture: str
    weight_files: tuple[Path, ...]
    tensors: dict[str, tuple[int, ...]]

    @property
    def size_bytes(self) -> int:
        """Return the size of the weight files."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def parameters(self) -> int:
        """Return the number of weights, as the files store them."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def context_length(self) -> int:
        """Return the longest input in tokens; 2048 where the configuration does not say."""
        nested = self.config.get("text_config")
        for table in (self.config, nested if isinstance(nested, dict) else {}):
            for key in _CONTEXT_KEYS:
                value = table.get(key)
                if isinstance(value, int) and value > 0:
                    return value
        return _DEFAULT_CONTEXT

    @property
    def quantization(self) -> str | None:
        """Return the quantisation method with its bits, e.g. `gptq-4bit`."""
        section = self.config.get("quantization_config")
        if not isinstance(section, dict):
            return None
        bits = section.get("bits") or (4 if section.get("load_in_4bit") else 8 if section.get("load_in_8bit") else None)
        return str(section.get("quant_method", "unknown")) + (f"-{bits}bit" if bits else "")


def read_model_folder(path: Path) -> ModelFolder:
    """Read and check the model folder `path`.

    Raises:
        BaseError: It is not a model folder, or not one that can be used.
        FileFormatError: One of its files is truncated, malformed or unsafe.
    """
    config = read_configuration(path)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise BaseError(f"{str(path / 'config.json')!r} names no architecture; expected 'architectures': ['...'].")
    return model_of(path, config, architectures[0], _weight_files(path))


def read_configuration(path: Path) -> dict[str, Any]:
    """Read the config.json of the model folder `path`.

    Raises:
        BaseError: There is none, or the model brings code of its own.
        FileFormatError: It is malformed.
    """
    if not (path / "config.json").is_file():
        raise BaseError(_no_config(path))
    config = read_json(path / "config.json")
    if "auto_map" in config:
        raise BaseError(
            f"The model in {str(path)!r} needs Python code of its own ('auto_map' in config.json), and code that comes "
            "with a model is never run; choose a base whose architecture transformers has built in."
        )
    return config


def model_of(path: Path, config: dict[str, Any], architecture: str, files: tuple[Path, ...]) -> ModelFolder:
    """Read the headers of a model's weight files.

    Raises:
        FileFormatError: One of them is truncated, malformed or unsafe, or a weight is held twice.
    """
    tensors: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in read_safetensors_header(file).tensors.items():
            if name in tensors:
                raise FileFormatError(f"{str(path)!r} holds the weight {name!r} twice, in two files.")
            tensors[name] = entry.shape
    if not tensors:
        raise FileFormatError(f"The weight files in {str(path)!r} hold no weights.")
    return ModelFolder(path, config, architecture, files, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        FileFormatError: It is too large, not JSON, or not an object.
    """
    size = path.stat().st_size
    if size > _JSON_LIMIT_BYTES:
        raise FileFormatError(f"{str(path)!r} is {size:,} bytes long; at most {_JSON_LIMIT_BYTES:,} are accepted.")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise FileFormatError(f"{str(path)!r} is not valid JSON: it is truncated or damaged.") from None
    if not isinstance(document, dict):
        raise FileFormatError(f"{str(path)!r} must hold a JSON object.")
    return document


def _weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files that hold the weights, as transformers would choose them."""
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    if (path / _INDEX).is_file():
        return indexed_files(path, path / _INDEX)
    raise BaseError(no_weights(path))


def indexed_files(path: Path, index: Path) -> tuple[Path, ...]:
    """Return the weight files in `path` that an index names.

    Raises:
        FileFormatError: The index is malformed, or a file is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{str(index)!r} has no 'weight_map'.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FileFormatError(f"{str(index)!r} names the file {name!r}, which is not allowed.")
        if not (path / name).is_file():
            raise FileFormatError(f"The weight file {name!r} of {str(path)!r} is missing; fetch the model again.")
    return tuple(path / name for name in names)


def _no_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{str(path)!r} holds an adapter, not a base model; add it with `haori library add`."
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return f"{str(path)!r} holds no config.json; name the GGUF file itself: {str(path / ggufs[0])!r}."
    return (
        f"{str(path)!r} is not a model folder: it has no config.json. "
        "A base is a folder with config.json, model.safetensors and a tokenizer."
    )


def no_weights(path: Path, expected: str = f"model.safetensors or {_INDEX} with its files") -> str:
    """Say that a model folder has no weights that can be read."""
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{str(path)!r} holds its weights as a pickle ({pickles[0]!r}); pickles can run code, so only safetensors "
            "is read. Convert it on a machine you trust: load it with its own library and call save_pretrained."
        )
    return f"{str(path)!r} holds no weights; expected {expected}."
