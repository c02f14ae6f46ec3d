"""What the folder of a stored adapter holds: the files of a PEFT adapter, or one file of another format.

One file is kept byte for byte as it came, so that its hashes stay those under which model sites know it.
"""

import shutil
from pathlib import Path

from haori.core.hashing import hash_data, hash_file
from haori.core.records import AdapterCard
from haori.core.safetensors_header import read_safetensors_header
from haori.library.adapter_files import inspect_adapter
from haori.library.cards import adapter_id, id_on_base, is_id_of
from haori.library.formats.format import SINGLE_FILE
from haori.library.formats.peft import copy_adapter

__all__ = ["content_id", "copy_contents", "describes", "file_id", "is_single_file"]


def is_single_file(folder: Path) -> bool:
    """Say whether a folder keeps an adapter that came as one file."""
    return (folder / SINGLE_FILE).is_file()


def file_id(path: Path) -> str:
    """Return the content id of an adapter that is one safetensors file, as `sha256:<hex>`.

    Raises:
        FileFormatError: The file is damaged.
    """
    read_safetensors_header(path)
    return hash_data([hash_file(path)])


def content_id(source: Path) -> str:
    """Return the content id of an adapter: one file, a folder that keeps one, or a PEFT folder.

    Raises:
        FileFormatError: The files are unusable.
    """
    if source.is_file():
        return file_id(source)
    return file_id(source / SINGLE_FILE) if is_single_file(source) else adapter_id(inspect_adapter(source))


def describes(card: AdapterCard, folder: Path) -> bool:
    """Say whether the files in a folder are those that its card is of.

    Raises:
        FileFormatError: The files are unusable.
    """
    if not is_single_file(folder):
        return is_id_of(card.id, inspect_adapter(folder), card.base)
    found = file_id(folder / SINGLE_FILE)
    return card.id in (found, id_on_base(found, card.base))


def copy_contents(source: Path, target: Path) -> None:
    """Copy an adapter, a file or a folder, into the existing folder `target`."""
    if source.is_file() or is_single_file(source):
        shutil.copyfile(source if source.is_file() else source / SINGLE_FILE, target / SINGLE_FILE)
    else:
        copy_adapter(source, target)
