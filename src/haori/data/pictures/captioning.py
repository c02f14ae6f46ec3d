"""Captions for a folder of pictures, written beside them; what has a caption keeps it unless it is to be replaced."""

from dataclasses import dataclass, field
from pathlib import Path

from haori.core.errors import DataError
from haori.core.storage import write_text
from haori.core.user_path import user_path
from haori.data.pictures.captioners import Captioner
from haori.data.pictures.folder import list_folder
from haori.data.pictures.listing import PictureFile
from haori.data.pictures.opening import open_picture
from haori.data.pictures.section import PictureSection
from haori.data.progress import tracked

__all__ = ["Captioned", "caption_folder", "pictures_to_caption"]


@dataclass(frozen=True, slots=True)
class Captioned:
    """What was done.

    Attributes:
        written: Caption files and captions, in order.
        kept: Pictures that had a caption.
        problems: Pictures that could not be read, or that the model had nothing to say of, as sentences.
    """

    written: list[tuple[Path, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def pictures_to_caption(given: str) -> list[PictureFile]:
    """Return the pictures of a folder.

    Raises:
        DataError: It is no folder, or has no pictures.
    """
    folder = user_path(given)
    if not folder.is_dir():
        raise DataError(f"{given!r} is no folder; captions are written beside the pictures of a folder.")
    files = list_folder(folder, given, PictureSection(path=given)).files
    if not files:
        raise DataError(f"The folder {given!r} holds no pictures.")
    return files


def caption_folder(
    files: list[PictureFile], captioner: Captioner, *, ending: str = ".txt", overwrite: bool = False
) -> Captioned:
    """Caption pictures; each file is written as soon as its caption is known.

    Args:
        files: From `pictures_to_caption`.
        captioner: What says the captions.
        ending: Of the files that are written.
        overwrite: Replace captions that are there.

    Raises:
        StorageError: A file cannot be written.
    """
    done = Captioned()
    for file in tracked(files, "Captioning", total=len(files), every=1):
        target = file.file.with_suffix(ending)
        try:
            if not overwrite and (target.exists() or file.caption() is not None):
                done.kept.append(file.origin)
                continue
            caption = captioner.caption(open_picture(file.file, file.origin).image)
        except DataError as error:
            done.problems.append(str(error))
            continue
        if not caption:
            done.problems.append(f"{file.origin}: the model says nothing of it; no caption is written.")
            continue
        write_text(target, f"{caption}\n")
        done.written.append((target, caption))
    return done
