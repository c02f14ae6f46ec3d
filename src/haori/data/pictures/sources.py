"""Which layout a source of pictures has, told by what it is, and what it lists."""

from pathlib import Path

from haori.core.errors import DataError, nearest
from haori.data.pictures.folder import list_folder
from haori.data.pictures.listing import Listing
from haori.data.pictures.opening import EXTENSIONS
from haori.data.pictures.section import PictureSection

__all__ = ["list_pictures"]


def list_pictures(section: PictureSection, given: str, *, prior: bool = False) -> Listing:
    """List the pictures of a source.

    Args:
        section: How captions are found.
        given: The source, as the user wrote it.
        prior: Whether these are regularisation pictures.

    Raises:
        DataError: There is no such source, or it holds no pictures.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        listing = list_folder(path, given, section.caption_extension, prior=prior)
    elif path.suffix.lower() in EXTENSIONS and path.is_file():
        raise DataError(f"{given!r} is one picture; give the folder that it is in.")
    else:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside)
        raise DataError(f"There is no folder of pictures {given!r}{'; ' if hint else '.'}{hint}")
    if not listing.files and not listing.problems:
        known = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"{given!r} holds no pictures; their names end in {known}.")
    return listing
