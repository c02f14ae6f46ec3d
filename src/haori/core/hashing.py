"""Content hashes: of bytes, of files, and of plain data.

Identity in this project is a SHA-256 of content, written as `sha256:<hex>`; the first 12 hex digits are shown to
people. Hashes of large files are cached by path, size and modification time.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haori.core.settings import settings
from haori.core.storage import write_text

__all__ = ["hash_bytes", "hash_data", "hash_file", "hash_parts", "short"]

_CHUNK = 1 << 20


def hash_bytes(data: bytes) -> str:
    """Return the hash of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def hash_parts(parts: Iterable[str]) -> str:
    """Return the hash of a sequence of strings, each with its length, so that no two sequences collide."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return f"sha256:{digest.hexdigest()}"


def hash_data(data: Any) -> str:
    """Return the hash of JSON-like data in canonical form (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hash_bytes(text.encode("utf-8", "surrogatepass"))


def hash_file(path: Path) -> str:
    """Return the hash of a file, from the cache when size and modification time are unchanged.

    A blob of the Hugging Face cache is named by its own SHA-256, which is reused.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64 and not set(real.name) - set("0123456789abcdef"):
        return f"sha256:{real.name}"
    stat = real.stat()
    entry = settings().cache / "hashes" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    stamp = [str(real), stat.st_size, stat.st_mtime_ns]
    try:
        cached = json.loads(entry.read_text())
        if cached["stamp"] == stamp:
            return str(cached["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    value = f"sha256:{digest.hexdigest()}"
    if stat.st_size > _CHUNK:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, json.dumps({"stamp": stamp, "hash": value}))
    return value


def hash_checkpoint_window(path: Path) -> str:
    """Return AutoV1, by which the first versions of AUTOMATIC1111's web UI and sd-scripts know a checkpoint.

    The first 8 digits of the SHA-256 of its bytes 0x100000 to 0x110000.
    """
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def short(value: str) -> str:
    """Return the 12 hex digits shown to people."""
    return value.removeprefix("sha256:")[:12]
