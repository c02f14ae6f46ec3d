"""The PEFT folder: which files belong to an adapter, writing one that stock PEFT loads anywhere, and the format."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.adapters.patterns import exact_patterns
from haori.core.errors import FileFormatError, InputError, LibraryError
from haori.core.storage import staged_folder
from haori.library.adapter_files import CONFIG_NAME, WEIGHTS_NAME, inspect_adapter
from haori.library.formats.format import Format, Source
from haori.library.formats.peft_components import component_folders
from haori.library.head_files import HEAD_NAME
from haori.library.word_files import WORDS_NAME

if TYPE_CHECKING:
    from haori.core.records import AdapterCard
    from haori.library.updates import AdapterUpdates

__all__ = ["FORMAT", "check_new_folder", "copy_adapter", "export_peft"]

_REQUIRED = (WEIGHTS_NAME, CONFIG_NAME)
# What may stand beside the weights: text, tokenizer, template and plots. Optimizer states, pickles, code and
# sub-folders such as checkpoints are not part of an adapter and stay behind.
_BESIDE = (
    "README*", "LICENSE*", "LICENCE*", "NOTICE*", "chat_template.jinja", "chat_template.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "generation_config.json", "*.png", "*.svg", "recipe.yaml",
    "metrics.jsonl", HEAD_NAME, WORDS_NAME,
)  # fmt: skip
_BESIDE_LIMIT_BYTES = 64 << 20
# Of which the networks of image models are made; a file that has them is read by the formats of image adapters.
_IMAGE_BLOCKS = ("double_blocks.", "single_blocks.", "transformer_blocks.", "down_blocks.", "up_blocks.", "mid_block.")


def copy_adapter(source: Path, target: Path) -> None:
    """Copy the files that make up an adapter, and only those, from one folder into an existing other."""
    beside = {
        path.name
        for pattern in _BESIDE
        for path in source.glob(pattern)
        if path.is_file() and path.stat().st_size <= _BESIDE_LIMIT_BYTES
    }
    for name in (*_REQUIRED, *sorted(beside)):
        shutil.copyfile(source / name, target / name)
    config = (source / CONFIG_NAME).read_bytes()
    encoding = json.detect_encoding(config)
    if encoding != "utf-8":  # with a byte order mark, or in UTF-16; PEFT reads neither
        (target / CONFIG_NAME).write_text(config.decode(encoding), encoding="utf-8")


def check_new_folder(out: Path) -> None:
    """Refuse to write into a folder that holds something, or over a file.

    Raises:
        InputError: `out` is in use.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{str(out)!r} already exists and is not an empty folder; choose a new one.")


def export_peft(
    folder: Path, card: "AdapterCard", out: Path, *, prove: Callable[[Path], None] = lambda _: None
) -> Path:
    """Write a stored adapter as a new stock PEFT folder.

    `base_model_name_or_path` is set to the hub id of the base where it has one, and to its name otherwise, since a
    path on this machine means nothing elsewhere. The card stays in the library: it may name private files. ARD-LoRA,
    which stock PEFT does not know, is written as the plain LoRA that it equals. Rank and alpha patterns whose meaning
    depends on the order of their keys are written with full names.

    Args:
        folder: Where the adapter is stored.
        card: Its card.
        out: The new folder.
        prove: Is given the finished folder before it takes the place of `out`, and raises if it is not right.

    Raises:
        InputError: `out` exists and is not empty.
        LibraryError: The stored files are damaged.
    """
    check_new_folder(out)
    with staged_folder(out) as stage:
        copy_adapter(folder, stage)
        if card.method == "ard_lora":
            _write_as_lora(folder, stage)
        try:
            files = inspect_adapter(stage)
        except FileFormatError as error:
            raise LibraryError(f"The files stored in {str(folder)!r} are damaged: {error}") from None
        config = dict(files.config)
        kind, _, place = card.base.source.partition(":")
        for field in () if config.get("target_parameters") else files.ordered_patterns:
            config[field] = exact_patterns(config[field], files.ranks or files.modules)
        config["base_model_name_or_path"] = place if kind == "hub" else card.base.name
        config["revision"] = card.base.revision if kind == "hub" else None
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        prove(stage)
    return out


def _write_as_lora(folder: Path, out: Path) -> None:
    """Write an ARD-LoRA adapter's weights and configuration as plain LoRA, over those in `out`."""
    from safetensors.torch import save_file

    from haori.adapters.ard_lora import to_lora

    config, tensors = to_lora(folder)
    save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(out))


class _Peft:
    """What PEFT's `save_pretrained` writes, and the weight file of a text model's adapter by itself."""

    name = "peft"
    title = "a PEFT folder, or a weight file with PEFT's names"

    def detect(self, source: Source) -> bool:
        """Say whether it is a folder with a configuration, or has PEFT's names and none of an image model's blocks."""
        if source.path.is_dir():
            return (source.path / CONFIG_NAME).is_file() or bool(component_folders(source.path))
        factors = [key for key in source.tensors if key.startswith("base_model.model.") and ".lora_" in key]
        return bool(factors) and not any(block in key for key in factors for block in _IMAGE_BLOCKS)

    def read(self, source: Source) -> "AdapterUpdates":
        """Read the adapter into the neutral form; see `peft_reading`."""
        from haori.library.formats.peft_reading import read_peft

        return read_peft(source)

    def write(
        self,
        updates: "AdapterUpdates",
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the neutral form as a folder; see `peft_writing`."""
        from haori.library.formats.peft_writing import write_peft

        write_peft(updates, path, card, base_config)


FORMAT: Format = _Peft()
