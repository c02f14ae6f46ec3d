"""What is looked up once of each picture: that it can be read, its size, its hash, and how it looks in the small."""

from dataclasses import dataclass
from pathlib import Path

from haori.core.hashing import hash_file
from haori.data.pictures.likeness import Likeness, likeness_of
from haori.data.pictures.opening import open_picture
from haori.data.pictures.saliency import salient_point

__all__ = ["Inspected", "inspect_picture"]


@dataclass(frozen=True, slots=True)
class Inspected:
    """A picture that can be read.

    Attributes:
        content_hash: Of the file's bytes.
        width: Upright, in pixels.
        height: Upright, in pixels.
        has_alpha: Whether any pixel is transparent.
        likeness: How it looks, for finding others like it.
        centre: Point to crop around, as shares of its sides.
        notes: What was done to it.
        copyright: The notice that it carries; None where it carries none.
    """

    content_hash: str
    width: int
    height: int
    has_alpha: bool
    likeness: Likeness
    centre: tuple[float, float]
    notes: tuple[str, ...]
    copyright: str | None


def inspect_picture(path: Path, origin: str, *, smart: bool) -> Inspected:
    """Decode a picture once.

    Args:
        path: Its file.
        origin: What people call it.
        smart: Look for the part that draws the eye, instead of taking the middle.

    Raises:
        DataError: It cannot be read.
    """
    picture = open_picture(path, origin)
    image = picture.image
    return Inspected(
        content_hash=hash_file(path),
        width=image.width,
        height=image.height,
        has_alpha=picture.alpha is not None,
        likeness=likeness_of(image),
        centre=salient_point(image) if smart else (0.5, 0.5),
        notes=picture.notes,
        copyright=picture.copyright,
    )
