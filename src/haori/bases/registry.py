"""The bases that are registered under a name: one folder each, `HAORI_HOME/bases/<name>`.

It holds `base.json` and, for a base that was converted or unpacked here, its weights in `model/`. A base that
lives elsewhere (a user's folder, the hub's cache) is only pointed at and never changed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from haori.core.errors import BaseError, FileFormatError
from haori.core.folder_swap import delete_folder, recover, recover_all
from haori.core.records import CheckpointHashes, Record
from haori.core.settings import settings
from haori.core.storage import explain_os_errors, staged_folder, write_text

__all__ = [
    "MODEL",
    "BaseRecord",
    "check_name",
    "home_of",
    "read_record",
    "register",
    "registered_names",
    "unregister",
    "write_record",
]

MODEL = "model"
_FILE = "base.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class BaseRecord(Record):
    """A registered base."""

    schema_version: Literal[1] = 1
    name: str
    source: str = Field(description="folder:, hub:, wheel:, gguf: or embedded: and where it came from.")
    path: str | None = Field(default=None, description="Folder of a base that lives elsewhere, else None.")
    revision: str | None = None
    licence: str | None = Field(default=None, description="Licence, where the model folder does not say.")
    checkpoint: CheckpointHashes | None = Field(
        default=None, description="Hashes of the checkpoint that it was converted from, if from one."
    )

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return Path(self.path) if self.path is not None else home_of(self.name) / MODEL


def check_name(name: str) -> str:
    """Return `name` if a base may be called that.

    Raises:
        BaseError: It holds other characters than letters, digits, '.', '_' and '-'.
    """
    if not _NAME.fullmatch(name):
        raise BaseError(
            f"A base cannot be called {name!r}; use up to 100 letters, digits, '.', '_' and '-', starting with a "
            "letter or digit, and give the name with --name."
        )
    return name


def home_of(name: str) -> Path:
    """Return the folder of the registered base `name`."""
    return settings().bases / check_name(name)


def read_record(name: str) -> BaseRecord | None:
    """Return the record of `name`, or None if nothing is registered under it.

    Raises:
        FileFormatError: The record is damaged.
    """
    if not _NAME.fullmatch(name):
        return None
    file = home_of(name) / _FILE
    if not file.is_file():
        recover(home_of(name))
    if not file.is_file():
        return None
    try:
        record = BaseRecord.model_validate(json.loads(file.read_bytes()))
    except (ValueError, ValidationError):
        raise FileFormatError(
            f"{str(file)!r} is damaged; run `haori bases remove {name}` and add the base again."
        ) from None
    return record.with_fields(name=name)


def write_record(record: BaseRecord, folder: Path) -> None:
    """Write `record` into the folder that is, or is about to become, its home."""
    write_text(folder / _FILE, json.dumps(record.model_dump(mode="json"), indent=2) + "\n")


def register(record: BaseRecord) -> None:
    """Register a base that lives elsewhere."""
    with staged_folder(home_of(record.name)) as stage:
        write_record(record, stage)


def unregister(name: str) -> None:
    """Forget `name` and delete what was converted for it; a base that lives elsewhere stays as it is."""
    home = home_of(name)
    with explain_os_errors(home):
        delete_folder(home)


def registered_names() -> Iterator[str]:
    """Yield the registered names in order."""
    root = settings().bases
    if root.is_dir():
        recover_all(root)
        yield from sorted(path.parent.name for path in root.glob(f"*/{_FILE}") if _NAME.fullmatch(path.parent.name))
