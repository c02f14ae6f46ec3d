"""Which layout a source of pictures has, told by what it is, and what it lists."""

from pathlib import Path

from haori.core.errors import DataError, nearest
from haori.core.user_path import user_path
from haori.data.folder_files import entries_of
from haori.data.pictures.archives import unpack
from haori.data.pictures.folder import list_folder, picture_files
from haori.data.pictures.kohya import list_kohya
from haori.data.pictures.listing import Listing
from haori.data.pictures.metadata import METADATA_NAMES
from haori.data.pictures.onetrainer import is_concepts, list_concepts
from haori.data.pictures.opening import EXTENSIONS
from haori.data.pictures.section import PictureSection
from haori.data.pictures.tables import list_table
from haori.data.readers import READERS

__all__ = ["holds_pictures", "list_pictures"]

_KINDS = (
    "a folder of pictures, a zip of one, a kohya dataset (.toml), OneTrainer concepts (.json), or a set with the "
    "pictures in it (.parquet, .arrow, a folder saved by `datasets`)"
)


def holds_pictures(given: str) -> bool:
    """Say whether a source is one of pictures, by names alone: a folder with a picture in it, or files about such.

    Raises:
        DataError: The folder holds more files than are read from one.
    """
    path = user_path(given)
    if path.is_dir():
        return any(file.suffix.lower() in EXTENSIONS for file in entries_of(path, given))
    return path.suffix.lower() in {".zip", ".toml"} or (path.suffix.lower() == ".json" and is_concepts(path))


def list_pictures(section: PictureSection, given: str, *, prior: bool = False) -> Listing:
    """List the pictures of a source.

    Args:
        section: How captions are found, and what goes for its pictures.
        given: The source, as the user wrote it.
        prior: Whether these are regularisation pictures.

    Raises:
        DataError: There is no such source, or it holds no pictures.
    """
    path = user_path(given)
    if path.is_dir():
        listing = _list_in(path, given, section, prior=prior)
    elif path.is_file():
        listing = _list_file(path, given, section, prior=prior)
    elif path.suffix or path.parent.name.startswith(".") or given.count("/") != 1:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) or f"give {_KINDS}."
        raise DataError(f"There is no {given!r}; {hint}")
    else:
        listing = list_table(given, section, prior=prior)  # a dataset of the hub, or what it says to a wrong name
    if not listing.files and not listing.problems:
        raise DataError(f"{given!r} holds no pictures; their names end in {', '.join(sorted(EXTENSIONS))}.")
    return listing


def _list_in(folder: Path, given: str, section: PictureSection, *, prior: bool) -> Listing:
    pictures, others = picture_files(folder, given)
    tables = [path for path in others if path.suffix.lower() in READERS and path.suffix.lower() != ".txt"]
    if not pictures and any(path.name not in METADATA_NAMES for path in tables):
        return list_table(given, section, prior=prior)
    return list_folder(folder, given, section, prior=prior)


def _list_file(path: Path, given: str, section: PictureSection, *, prior: bool) -> Listing:
    kind = path.suffix.lower()
    if kind == ".zip":
        folder = unpack(path, given)
        inner = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
        if len(inner) == 1 and not any(entry.is_file() for entry in folder.iterdir()):
            folder, given = inner[0], f"{given}/{inner[0].name}"  # the folder that was packed
        return _list_in(folder, given, section, prior=prior)
    if kind == ".toml":
        return list_kohya(path, given, section, prior=prior)
    if kind == ".json" and is_concepts(path):
        return list_concepts(path, given, section, prior=prior)
    if path.name in METADATA_NAMES:
        return list_folder(path.parent, str(Path(given).parent), section, prior=prior)
    if kind in (".parquet", ".arrow"):
        return list_table(given, section, prior=prior)
    if kind in EXTENSIONS:
        raise DataError(f"{given!r} is one picture; give the folder that it is in.")
    raise DataError(f"{given!r} is of an unknown kind; give {_KINDS}.")
