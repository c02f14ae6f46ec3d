"""A zip of pictures, unpacked into the cache within bounds; what lies there is keyed by the archive's content."""

import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from haori.core.errors import DataError
from haori.core.hashing import hash_data, hash_file, short
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.data.folder_files import MAX_FILES
from haori.data.pictures.opening import MAX_FILE_BYTES
from haori.data.progress import tracked

__all__ = ["unpack"]

_VERSION = 1
_MOST_BYTES = 64 << 30
_MOST_RATIO = 100
_FREE_OF_RATIO = 256 << 20
_CHUNK = 1 << 20


def unpack(path: Path, given: str) -> Path:
    """Return a folder with the files of a zip.

    Raises:
        DataError: It is broken or encrypted, a name in it leads outside, it holds too much, or it is packed so densely
            that it is no archive of pictures.
    """
    folder = settings().cache / "picture-sets" / short(hash_data([_VERSION, hash_file(path)]))
    if folder.is_dir():
        return folder
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check(entries, given, path.stat().st_size)
            with staged_folder(folder) as stage:
                for entry in tracked(entries, "Unpacking", total=len(entries)):
                    _write(archive, entry, stage, given)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{given!r} is a broken zip ({' '.join(str(error).split())[:100]}).") from None
    return folder


def _check(entries: list[zipfile.ZipInfo], given: str, packed_bytes: int) -> None:
    if len(entries) > MAX_FILES:
        raise DataError(f"{given!r} holds {len(entries):,} files; a zip may hold {MAX_FILES:,}; part it.")
    total = sum(entry.file_size for entry in entries)
    if total > _MOST_BYTES or total > max(_FREE_OF_RATIO, _MOST_RATIO * packed_bytes):
        raise DataError(
            f"{given!r} unpacks to {total >> 20:,} MiB, which no zip of pictures of {packed_bytes >> 20:,} MiB does; "
            "unpack it yourself and give the folder, if you know it."
        )
    seen: set[str] = set()
    for entry in entries:
        name = PurePosixPath(entry.filename)
        odd = not name.parts or any(letter in entry.filename for letter in "\\:")
        if odd or name.is_absolute() or ".." in name.parts:
            raise DataError(f"{given!r} holds the name {entry.filename!r}, which leads outside; it is refused.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{given!r} holds a link, {entry.filename!r}; it is refused. Pack the file itself.")
        if entry.flag_bits & 1:
            raise DataError(f"{given!r} is encrypted; unpack it yourself and give the folder.")
        if str(name) in seen:
            raise DataError(f"{given!r} holds {entry.filename!r} twice.")
        seen.add(str(name))


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, stage: Path, given: str) -> None:
    target = stage / PurePosixPath(entry.filename)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(entry) as source, target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > MAX_FILE_BYTES:
                raise DataError(
                    f"{given}/{entry.filename} has more than the {MAX_FILE_BYTES >> 20} MiB that a picture may have."
                )
            file.write(chunk)
