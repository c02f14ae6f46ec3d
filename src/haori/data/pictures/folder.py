"""A folder of pictures: captions in files of the same name, and folders named `10_name` that are repeated.

The number may be 1 to 1,000, so that a year in front of a name is none.

Read recursively in sorted order; hidden files are left out. Masks beside the pictures are never taken for pictures.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from haori.core.errors import DataError
from haori.data.pictures.captions import ENDINGS, read_sidecar
from haori.data.pictures.listing import Listing, PictureFile, picture_origin
from haori.data.pictures.masks import pair_masks
from haori.data.pictures.opening import EXTENSIONS

__all__ = ["caption_reader", "list_folder", "picture_files"]

_REPEATED = re.compile(r"(\d{1,6})_(.*)")
_MOST_REPEATS = 1000
_UNREAD_PICTURES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".exr", ".hdr", ".tga"})


def picture_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the pictures of a folder and its other files, hidden ones left out, in sorted order."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    pictures = [path for path in found if path.suffix.lower() in EXTENSIONS]
    chosen = set(pictures)
    return pictures, [path for path in found if path not in chosen]


def caption_reader(path: Path, origin: str, ending: str) -> Callable[[], str | None]:
    """Return what reads the caption beside a picture; None where there is no file, or nothing in it.

    Args:
        path: The picture.
        origin: What people call it.
        ending: `.txt`, `.caption`, or `auto` for either.
    """
    endings = ENDINGS if ending == "auto" else (ending,)

    def read() -> str | None:
        beside = [path.with_suffix(end) for end in endings if path.with_suffix(end).is_file()]
        named = {file.suffix: read_sidecar(file, str(Path(origin).with_suffix(file.suffix))) for file in beside}
        texts = {text for text in named.values() if text}
        if len(texts) > 1:
            raise DataError(
                f"{origin} has two captions, {' and '.join(named)}, that differ; say which is meant with --set "
                f"data.caption_extension={next(iter(named))}."
            )
        return texts.pop() if texts else None

    return read


def list_folder(folder: Path, given: str, ending: str, *, prior: bool = False) -> Listing:
    """List a folder.

    Args:
        folder: To read.
        given: As the user wrote it.
        ending: Of caption files; `auto` takes either.
        prior: Whether these are regularisation pictures.
    """
    pictures, others = picture_files(folder)
    mask_of = pair_masks(pictures)
    masks = set(mask_of.values())
    files, notes, repeated = [], [], {}
    top = folder.resolve().name
    for path in (path for path in pictures if path not in masks):
        number, name, said = _repeats((*path.relative_to(folder).parts[:-1][::-1], top))
        if said:
            repeated[said] = number
        origin = picture_origin(given, folder, path)
        files.append(
            PictureFile(
                origin, path, caption_reader(path, origin, ending), fallback=name, mask=mask_of.get(path),
                repeats=number, prior=prior,
            )
        )  # fmt: skip
    if repeated:
        told = ", ".join(f"{name} ({number})" for name, number in list(repeated.items())[:8])
        notes.append(
            f"Pictures come as often in an epoch as the number before their folder's name says: {told}"
            f"{' ...' if len(repeated) > 8 else ''}."
        )
    captions = {path.with_suffix(end) for path in pictures for end in ENDINGS}
    ignored = [picture_origin(given, folder, path) for path in others if path not in captions]
    if unread := [path for path in others if path.suffix.lower() in _UNREAD_PICTURES]:
        notes.append(
            f"Pictures of a kind that is not read: {', '.join(path.name for path in unread[:3])}"
            f"{' ...' if len(unread) > 3 else ''} ({len(unread)}); convert them to PNG or JPEG."
        )
    return Listing("folder", files, ignored, notes)


def _repeats(folders: Sequence[str]) -> tuple[int, str | None, str | None]:
    """Return how often a picture is repeated, the name behind the number, and the folder that says so."""
    for folder in folders:
        if (found := _REPEATED.fullmatch(folder)) and 1 <= int(found[1]) <= _MOST_REPEATS:
            return int(found[1]), found[2].replace("_", " ").strip() or None, folder
    return 1, None, None
