"""Reads an adapter's folder without torch: its configuration and the header of its weights.

An adapter may come from a stranger, so everything is checked here before PEFT sees the folder: file kinds, sizes,
the safetensors header, the method. Says nothing about any base: that is `attach`.
"""

import json
import math
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from haori.adapters.patterns import clash_of
from haori.core.errors import FileFormatError, nearest
from haori.core.new_words import NewWords
from haori.core.records import Head
from haori.core.safetensors_header import TensorEntry, read_safetensors_header
from haori.library.config_values import check_values
from haori.library.head_files import read_head
from haori.library.peft_options import PEFT_OPTIONS, unknown_options
from haori.library.word_files import read_words

__all__ = [
    "CONFIG_NAME",
    "OWN_TYPES",
    "PEFT_TYPES",
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "AdapterFiles",
    "adapters_below",
    "inspect_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_NO_MODULES = "dummy-target-modules"  # what PEFT writes where only whole modules are kept
_CONFIG_LIMIT_BYTES = 1 << 20
_CHECKPOINT = re.compile(r"checkpoint-.*")

OWN_TYPES = frozenset({"ARD_LORA"})  # methods that `adapters` adds to PEFT
PEFT_TYPES = frozenset(PEFT_OPTIONS) - OWN_TYPES
# Of fewer than 16 bits only those that torch turns into others; 4 and 6 bits, and scales, are no weights by themselves.
_UNREADABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
_REFUSED_KEYS = {
    "arrow_config": "it routes between other adapters, which its folder does not hold",
    "megatron_config": "it was trained inside Megatron, whose layers this project does not build",
}


@dataclass(frozen=True)
class AdapterFiles:
    """What a PEFT folder says about itself.

    Attributes:
        folder: The folder.
        peft_type: The method as PEFT spells it, e.g. LORA.
        config: The whole of adapter_config.json.
        tensors: Name, dtype and shape of every tensor.
        ranks: Rank of every LoRA module by module name; empty for methods without one.
        alpha: The configuration's alpha, if the method has one.
        use_rslora: The scale is alpha / sqrt(rank) rather than alpha / rank.
        use_dora: The update has a magnitude vector (DoRA).
        modules_to_save: Modules that are stored whole.
        trainable_tokens: Token ids whose embeddings are stored.
        target_modules: Names or the one regular expression of the adapted modules.
        size_bytes: Size of the weight file.
        head: The head of a classifier, with its labels.
        words: New words whose vectors are stored.
    """

    folder: Path
    peft_type: str
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    ranks: dict[str, int]
    alpha: float | None
    use_rslora: bool
    use_dora: bool
    modules_to_save: tuple[str, ...]
    trainable_tokens: tuple[int, ...]
    target_modules: tuple[str, ...]
    size_bytes: int
    head: Head | None = None
    words: NewWords | None = None

    @property
    def method(self) -> str:
        """Return the method in lower case; LoRA with a magnitude vector is `dora`, one without modules is `head`."""
        if self.config.get("target_modules") == _NO_MODULES:
            return "head"
        return "dora" if self.use_dora else self.peft_type.lower()

    @property
    def rank(self) -> int | None:
        """Return the largest rank of any module, or None where the method has no LoRA factors."""
        return max(self.ranks.values(), default=None)

    @property
    def parameters(self) -> int:
        """Return the number of stored values."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    @property
    def ordered_patterns(self) -> tuple[str, ...]:
        """Return the tables by module, such as `rank_pattern`, that mean something else when their keys are sorted."""
        tables = {key: v for key, v in self.config.items() if key.endswith("_pattern") and isinstance(v, dict)}
        if self.peft_type == "ADALORA":
            tables.pop("rank_pattern", None)  # lists by full name
        return tuple(sorted(key for key, table in tables.items() if clash_of(table, self.modules)))

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the full names of the modules that the tensors belong to, whatever the method calls its parts."""
        names = [key.removeprefix("base_model.model.").split(".") for key in self.tensors]
        ends = {".".join(parts[:-cut]) for parts in names for cut in (1, 2) if len(parts) > cut}
        return tuple(sorted(ends | self.ranks.keys()))

    @property
    def weights(self) -> Path:
        """Return the path of the weight file."""
        return self.folder / WEIGHTS_NAME


def inspect_adapter(folder: Path) -> AdapterFiles:
    """Read and check a PEFT folder without loading a tensor.

    Raises:
        FileFormatError: A file is missing, a pickle, oversized, truncated or malformed, or the method is unknown or
            needs more than the folder holds.
    """
    if not folder.is_dir():
        raise FileFormatError(f"{str(folder)!r} is not a folder; an adapter is a folder with {CONFIG_NAME} in it.")
    config = _read_config(folder / CONFIG_NAME)
    peft_type = _check_method(folder, config)
    _check_options(folder, peft_type, config)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise FileFormatError(_no_weights(folder))
    tensors = read_safetensors_header(weights).tensors
    if not tensors:
        raise FileFormatError(f"{str(weights)!r} holds no tensors, so there is no adapter in it.")
    for key, entry in tensors.items():
        if entry.dtype in _UNREADABLE:
            raise FileFormatError(
                f"The tensor {key!r} in {str(weights)!r} is of dtype {entry.dtype}, which cannot be read as weights; "
                "save the adapter in fp32, fp16 or bf16."
            )
    check_values(f"The adapter in {str(folder)!r}", peft_type, config, tensors)
    alpha = next((config[key] for key in ("lora_alpha", "alpha") if config.get(key) is not None), None)
    return AdapterFiles(
        folder=folder,
        peft_type=peft_type,
        config=config,
        tensors=tensors,
        ranks=_ranks(tensors),
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        modules_to_save=_names(config.get("modules_to_save")),
        trainable_tokens=_token_ids(config.get("trainable_token_indices", config.get("token_indices"))),
        target_modules=_names(config.get("target_modules")),
        size_bytes=weights.stat().st_size,
        head=read_head(folder, config, tensors),
        words=read_words(folder, tensors),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileFormatError(_no_config(path.parent))
    size = path.stat().st_size
    if size > _CONFIG_LIMIT_BYTES:
        raise FileFormatError(f"{str(path)!r} is {size:,} bytes; at most {_CONFIG_LIMIT_BYTES:,} are accepted.")
    try:
        config = json.loads(path.read_bytes())  # of bytes it finds the encoding, with or without a byte order mark
    except (ValueError, RecursionError):
        raise FileFormatError(f"{str(path)!r} is not a JSON file.") from None
    if not isinstance(config, dict):
        raise FileFormatError(f"{str(path)!r} must hold a JSON object.")
    return config


def _check_method(folder: Path, config: dict[str, Any]) -> str:
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_OPTIONS:
        hint = nearest(str(peft_type).upper()[:40], sorted(PEFT_OPTIONS)) or "such as LORA."
        raise FileFormatError(
            f"The adapter in {str(folder)!r} has peft_type {str(peft_type)[:40]!r}, which PEFT does not know; {hint}"
        )
    if peft_type == "XLORA":
        raise FileFormatError(
            f"The adapter in {str(folder)!r} is X-LoRA: it mixes other adapters, which its folder lacks."
        )
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key):
            raise FileFormatError(f"The adapter in {str(folder)!r} sets {key!r}: {reason}.")
    return peft_type


def _check_options(folder: Path, peft_type: str, config: dict[str, Any]) -> None:
    for name, value in unknown_options(peft_type, config).items():
        raise FileFormatError(
            f"The adapter in {str(folder)!r} sets {name[:80]!r} to {str(value)[:80]!r}, an option of {peft_type} that "
            f"PEFT {version('peft')} does not know and would leave out, so the adapter would compute something else; "
            "use a PEFT that knows it, or remove the option from adapter_config.json if that is its default there."
        )


def adapters_below(folder: Path) -> tuple[Path, ...]:
    """Return the folders directly in `folder` that hold an adapter, without a trainer's checkpoints."""
    found = (path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}")))
    return tuple(path for path in found if not _CHECKPOINT.fullmatch(path.name))


def _no_config(folder: Path) -> str:
    if (folder / "adapter.safetensors").is_file():
        return (
            f"The adapter in {str(folder)!r} is for an image model and kept as one file; what was asked for works with "
            "adapters of language models only."
        )
    if below := adapters_below(folder):
        names = ", ".join(repr(path.name) for path in below[:20])
        return (
            f"{str(folder)!r} holds {len(below)} adapter{'s' if len(below) > 1 else ''} in folders of their own: "
            f"{names}; give one of them, such as {str(below[0])!r}."
        )
    return f"{str(folder)!r} holds no {CONFIG_NAME}; an adapter is a folder as PEFT's save_pretrained writes it."


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE_NAME).is_file():
        return (
            f"{str(folder)!r} holds {PICKLE_NAME}, a Python pickle, which can run code when it is read. Convert it "
            f"with `haori library convert-pickle {shlex.quote(str(folder / PICKLE_NAME))} --out "
            f"{shlex.quote(str(folder / WEIGHTS_NAME))}`, which reads nothing but tensors, in a process of its own, "
            f"and remove {PICKLE_NAME}."
        )
    return f"{str(folder)!r} holds no {WEIGHTS_NAME}, the file with the adapter's weights."


def _ranks(tensors: dict[str, TensorEntry]) -> dict[str, int]:
    """Return the rank of each module from the shape of A: [R, in], or [R, vocabulary] for an embedding."""
    ranks = {}
    for key, entry in tensors.items():
        for suffix in (".lora_A.weight", ".lora_embedding_A", ".lora_A"):
            if key.endswith(suffix) and entry.shape:
                ranks[key.removesuffix(suffix).removeprefix("base_model.model.")] = entry.shape[0]
                break
    return ranks


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    # PEFT writes sets, whose order differs from run to run.
    return tuple(sorted(str(item) for item in value)) if isinstance(value, list) else ()


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, dict):
        value = [item for items in value.values() if isinstance(items, list) for item in items]
    return tuple(sorted({item for item in value if type(item) is int})) if isinstance(value, list) else ()
