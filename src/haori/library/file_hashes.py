"""The hashes under which model sites and tools know a weight file.

| name | of what | shown as |
|---|---|---|
| sha256 | the whole file | 64 digits |
| autov1 | its bytes 0x100000 to 0x110000, as A1111's first versions did | 8 |
| autov2 | the whole file | 10 |
| autov3 | what follows the safetensors header, so that editing metadata keeps it; kohya's `sshs_model_hash` | 12 |

Digits are lower case here, upper case on Civitai.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileHashes", "WeightHashes", "hash_weight_file"]

_CHUNK_BYTES = 1 << 20
_FIRST, _LAST = 0x100000, 0x110000


class FileHashes(NamedTuple):
    """The hashes of one file, as digits in lower case; `autov3` is None for a file that is not safetensors."""

    sha256: str
    autov1: str
    autov2: str
    autov3: str | None

    def as_dict(self) -> dict[str, str]:
        """Return them by name, without one that is None."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def hash_weight_file(path: Path) -> FileHashes:
    """Return all hashes of a file, which is read once.

    Args:
        path: A safetensors file, whose header was checked; or another file.
    """
    whole, window, data = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    position = 0
    with path.open("rb") as file:
        first = file.read(9)
        file.seek(0)
        start = 8 + int.from_bytes(first[:8], "little") if first[8:] == b"{" else None
        while chunk := file.read(_CHUNK_BYTES):
            whole.update(chunk)
            window.update(chunk[max(_FIRST - position, 0) : max(_LAST - position, 0)])
            if start is not None:
                data.update(chunk[max(start - position, 0) :])
            position += len(chunk)
    sha256 = whole.hexdigest()
    autov3 = data.hexdigest()[:12] if start is not None else None
    return FileHashes(sha256, window.hexdigest()[:8], sha256[:10], autov3)


class WeightHashes:
    """The hashes of kohya's metadata, of a safetensors file that is being written.

    Args:
        header_bytes: Length of what comes before the data.
    """

    def __init__(self, header_bytes: int) -> None:
        self._position = header_bytes
        self._data, self._window = hashlib.sha256(), hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Take in the next bytes of the data."""
        self._data.update(data)
        self._window.update(data[max(_FIRST - self._position, 0) : max(_LAST - self._position, 0)])
        self._position += len(data)

    def whole(self) -> str:
        """Return `sshs_model_hash`: the 64 digits of which AutoV3 is the first 12."""
        return self._data.hexdigest()

    def legacy(self) -> str:
        """Return `sshs_legacy_hash`, which is AutoV1 where the header is shorter than 1 MiB."""
        return self._window.hexdigest()[:8]
