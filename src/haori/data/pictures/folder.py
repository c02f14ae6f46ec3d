"""A folder of pictures: captions in files of the same name or in metadata, and folders like `10_name` repeated.

Read recursively in sorted order; hidden files are left out. The number of a folder may be 1 to 1,000, so that a year
in front of a name is none. Masks beside the pictures are never taken for pictures. Folders `train`, `validation` and
`test` at the top are splits, where there is one to train on and another.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from haori.core.errors import DataError
from haori.data.folder_files import files_of
from haori.data.pictures.captions import ENDINGS, read_sidecar
from haori.data.pictures.card import card_licence
from haori.data.pictures.listing import Listing, PictureFile, listed, picture_origin
from haori.data.pictures.masks import pair_masks
from haori.data.pictures.metadata import METADATA_NAMES, Metadata, read_metadata
from haori.data.pictures.opening import EXTENSIONS
from haori.data.pictures.section import PictureSection
from haori.data.splits import choose_split, kind_of, unknown_split

__all__ = ["list_folder", "picture_files"]

_REPEATED = re.compile(r"(\d{1,6})_(.*)")
_MOST_REPEATS = 1000
_UNREAD_PICTURES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".exr", ".hdr", ".tga"})
_SPLITS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})


def picture_files(folder: Path, given: str, *, recursive: bool = True) -> tuple[list[Path], list[Path]]:
    """Return the pictures of a folder and its other files, hidden ones left out, in sorted order.

    Raises:
        DataError: There are more than are read from one folder.
    """
    found = files_of(folder, given, recursive=recursive)
    pictures = [path for path in found if path.suffix.lower() in EXTENSIONS]
    chosen = set(pictures)
    return pictures, [path for path in found if path not in chosen]


def list_folder(
    folder: Path,
    given: str,
    section: PictureSection,
    *,
    prior: bool = False,
    recursive: bool = True,
    numbered: bool = True,
) -> Listing:
    """List a folder.

    Args:
        folder: To read.
        given: As the user wrote it.
        section: How captions are found, and what goes for its pictures.
        prior: Whether these are regularisation pictures.
        recursive: Whether folders in it are read as well.
        numbered: Whether a number before a folder's name says how often its pictures come.

    Raises:
        DataError: Its splits are not as `section.split` says, or it holds more files than are read from one folder.
    """
    pictures, others = picture_files(folder, given, recursive=recursive)
    metadata = read_metadata(folder, given, [path for path in others if path.name in METADATA_NAMES], section)
    mask_of = pair_masks(pictures)
    masks = set(mask_of.values())
    splits = _Splits(folder, given, section.split, [path for path in pictures if path not in masks])
    files, repeated = [], {}
    top = folder.resolve().name
    for path, held_out in splits.taken:
        number, name, said = (
            _repeats((*path.relative_to(folder).parts[:-1][::-1], top)) if numbered else (1, None, None)
        )
        if said:
            repeated[said] = number
        origin = picture_origin(given, folder, path)
        files.append(
            PictureFile(
                origin, path, _caption_reader(path, origin, section, metadata), section, fallback=name,
                mask=mask_of.get(path), repeats=number, prior=prior, held_out=held_out,
            )
        )  # fmt: skip
    notes = [*metadata.notes, *splits.notes]
    if repeated:
        told = listed([f"{name} ({number})" for name, number in repeated.items()], 8)
        notes.append(f"Pictures come as often in an epoch as the number before their folder's name says: {told}.")
    if unread := [path.name for path in others if path.suffix.lower() in _UNREAD_PICTURES]:
        notes.append(f"Pictures of a kind that is not read: {listed(unread)}; convert them to PNG or JPEG.")
    known = {path.with_suffix(end) for path in pictures for end in ENDINGS} | metadata.files
    ignored = [picture_origin(given, folder, path) for path in others if path not in known]
    layout = "+".join(sorted({path.name for path in metadata.files})) or "folder"
    licences = metadata.licences or [licence for licence in [card_licence(folder)] if licence]
    return Listing(layout, files, ignored, notes, metadata.problems, licences)


def _caption_reader(path: Path, origin: str, section: PictureSection, metadata: Metadata) -> Callable[[], str | None]:
    """Return what reads the caption of a picture: from metadata or the file beside it; None where neither has one."""
    endings = ENDINGS if section.caption_extension == "auto" else (section.caption_extension,)

    def read() -> str | None:
        found = [file for end in endings if (file := path.with_suffix(end)).is_file()]
        named = {file.name: read_sidecar(file, str(Path(origin).with_name(file.name))) for file in found}
        if (told := metadata.captions.get(path)) is not None:
            named[told.origin] = told.caption
        texts = {text for text in named.values() if text}
        if len(texts) > 1:
            remedy = "remove one of them"
            if len(found) > 1:
                remedy += f", or say which is meant with --set data.caption_extension={found[0].suffix}"
            raise DataError(f"{origin} has captions that differ, in {' and '.join(named)}; {remedy}.")
        return texts.pop() if texts else None

    return read


def _repeats(folders: Sequence[str]) -> tuple[int, str | None, str | None]:
    """Return how often a picture is repeated, the name behind the number, and the folder that says so."""
    for folder in folders:
        if (found := _REPEATED.fullmatch(folder)) and 1 <= int(found[1]) <= _MOST_REPEATS:
            return int(found[1]), found[2].replace("_", " ").strip() or None, folder
    return 1, None, None


class _Splits:
    """Which pictures are read, and as what.

    Attributes:
        taken: Pictures, and whether they are for validation.
        notes: What was taken and left.
    """

    def __init__(self, folder: Path, given: str, wanted: str, pictures: Sequence[Path]) -> None:
        tops = [path.relative_to(folder).parts[0] for path in pictures]
        names = sorted({top for path, top in zip(pictures, tops, strict=True) if path.name != top} & _names(tops))
        where = f"The folder {given!r}"
        self.notes: list[str] = []
        kinds = {kind_of(name) for name in names}
        if kind_of(wanted) == "train" and not (len(kinds) > 1 and "train" in kinds):  # a train may be a locomotive
            self.taken = [(path, False) for path in pictures]
            return
        chosen = choose_split(names, wanted, where)
        if chosen is None:
            raise (
                unknown_split(where, wanted, names)
                if names
                else DataError(f"{where} has no split {wanted!r}: it has no folder of that name; leave data.split out.")
            )
        held = choose_split(names, "validation", where)
        held = None if held == chosen else held
        self.taken = [(path, top == held) for path, top in zip(pictures, tops, strict=True) if top in (chosen, held)]
        others = {path for path, top in zip(pictures, tops, strict=True) if top not in (chosen, held)}
        left = sorted({_top(path, folder) for path in others})
        note = f"Read the folder {chosen} as train" + (f", {held} as validation" if held else "")
        self.notes.append(f"{note}; not read: {listed(left)}." if left else f"{note}.")


def _names(tops: Sequence[str]) -> set[str]:
    return {top for top in tops if top.lower() in _SPLITS}


def _top(path: Path, folder: Path) -> str:
    return "pictures beside them" if path.parent == folder else path.relative_to(folder).parts[0]
