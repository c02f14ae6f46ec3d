"""What stands beside a LoRA file in a `models/Lora` tree: A1111's `.json`, a `.civitai.info`, a preview picture.

They are only read: whatever other keys they hold stays as it is.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field

from haori.core.records import Permissions, Record
from haori.library.exchange.civitai_version import CivitaiVersion, read_version

__all__ = ["Sidecars", "read_sidecars", "sidecar_names"]

_LIMIT_BYTES = 4 << 20
_LONGEST = 4000
_PICTURES = ("png", "jpg", "jpeg", "webp")


class Sidecars(Record):
    """What the files beside an adapter say of it."""

    description: str = ""
    trigger_words: tuple[str, ...] = ()
    strength: float | None = Field(default=None, description="Strength that its user prefers; A1111's weight.")
    negative_prompt: str = ""
    notes: str = ""
    base: str = Field(default="", description="Base as A1111 or Civitai calls it, such as SD1 or SDXL 1.0.")
    tags: tuple[str, ...] = ()
    hashes: dict[str, str] = Field(default_factory=dict, description="Stated hashes of the file, not checked.")
    permissions: Permissions | None = None
    source: str | None = Field(default=None, description="Where it came from, such as civitai:1234.")
    preview: str | None = Field(default=None, description="Name of the picture beside it.")
    problems: tuple[str, ...] = Field(default=(), description="Why a sidecar could not be read, as sentences.")


def sidecar_names(name: str, beside: Collection[str]) -> tuple[str, ...]:
    """Return the names of the sidecars of the file `name` among the names in its folder."""
    stem = name.rpartition(".")[0]
    pictures = (f"{stem}{middle}.{kind}" for middle in (".preview", "") for kind in _PICTURES)
    return tuple(found for found in (f"{stem}.json", f"{stem}.civitai.info", *pictures) if found in beside)


def read_sidecars(folder: Path, names: tuple[str, ...]) -> Sidecars:
    """Read the sidecars that are there, given by `sidecar_names`; what cannot be read is told in `problems`."""
    problems: list[str] = []
    own: dict[str, Any] = {}
    version: CivitaiVersion | None = None
    for name in names:
        if name.endswith(".civitai.info"):
            version = read_version(_document(folder / name, problems))
        elif name.endswith(".json"):
            own = _document(folder / name, problems)
    strength = own.get("preferred weight")
    hashes = [file.hashes for file in version.files] if version else []
    return Sidecars(
        description=_text(own.get("description")) or (version.description if version else ""),
        trigger_words=_triggers(own, version),
        strength=float(strength) if isinstance(strength, int | float) and 0 < abs(strength) < 100 else None,
        negative_prompt=_text(own.get("negative text")),
        notes=_text(own.get("notes")),
        base=(version.base if version else "") or _known(_text(own.get("sd version"))),
        tags=version.tags if version else (),
        # Of a version with several files it does not say which one this is.
        hashes=hashes[0] if len(hashes) == 1 else {},
        permissions=version.permissions if version else None,
        source=f"civitai:{version.id}" if version and version.id is not None else None,
        preview=next((name for name in names if name.endswith(_PICTURES)), None),
        problems=tuple(problems),
    )


def _document(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT_BYTES + 1)
        found = json.loads(raw.decode("utf-8-sig")) if len(raw) <= _LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name!r} beside it could not be read: it is no JSON object.")
    return {}


def _triggers(own: dict[str, Any], version: CivitaiVersion | None) -> tuple[str, ...]:
    said = [part.strip() for part in re.split(r"[,\n]", _text(own.get("activation text")))]
    return tuple(dict.fromkeys(word for word in (*said, *(version.trigger_words if version else ())) if word))


def _known(text: str) -> str:
    return "" if text.casefold() == "unknown" else text


def _text(value: Any) -> str:
    return value[:_LONGEST].strip() if isinstance(value, str) else ""
