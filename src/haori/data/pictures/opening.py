"""Pictures from untrusted files: opened within bounds, turned upright, made RGB, with a note of everything done.

Readers of pictures are a way into a machine, so only plain raster formats are tried (no PostScript, no fonts), and
what would fill the memory is refused by its header.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import DataError, MissingExtraError
from haori.data.pictures.colour_profile import to_srgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EXTENSIONS", "MAX_FILE_BYTES", "MAX_PIXELS", "Picture", "open_mask", "open_picture", "require_pillow"]

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
MAX_FILE_BYTES = 256 << 20
MAX_PIXELS = 89_478_485  # as PIL warns from: a quarter of a gigabyte in RGB
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
_WHITE = (255, 255, 255, 255)
_OF_16_BITS = 257.0  # 65535 / 255


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: Upright, in RGB, what was transparent composed on white.
        alpha: Its alpha channel, in L; None where every pixel is opaque.
        notes: What was done to it, in a few words each.
        copyright: The notice in its EXIF data; None where there is none.
    """

    image: "Image"
    alpha: "Image | None"
    notes: tuple[str, ...]
    copyright: str | None = None


def require_pillow() -> None:
    """Check that pictures can be read at all.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("Pictures need pillow; install it with `pip install 'haori[images]'`.") from None


def open_picture(source: Path | bytes, origin: str) -> Picture:
    """Read a picture whole.

    Args:
        source: The file, or its content.
        origin: What messages call it.

    Raises:
        DataError: It is empty, broken, too large, or no picture; the message begins with `origin`.
        MissingExtraError: Pillow is not installed.
    """
    with _decoded(source, origin) as (image, notes):
        upright, notice = _upright(image, notes)
        if "16-bit" in notes:
            upright = _eight_bits(upright, origin)
        upright = to_srgb(upright, notes)
        if upright.mode == "P" and "transparency" not in upright.info:
            notes.append("palette")
        if upright.has_transparency_data:
            whole = upright.convert("RGBA")
            alpha = whole.getchannel("A")
            if alpha.getextrema() != (255, 255):
                notes.append("alpha on white")
                return Picture(_on_white(whole), alpha, tuple(notes), notice)
            return Picture(whole.convert("RGB"), None, tuple(notes), notice)
        if upright.mode == "CMYK":
            notes.append("CMYK")
        return Picture(upright.convert("RGB"), None, tuple(notes), notice)


def open_mask(source: Path | bytes, origin: str) -> "Image":
    """Read a mask: the brightness of a picture, in L, upright; its own alpha is no part of it.

    Raises:
        DataError: As for a picture.
    """
    return open_picture(source, origin).image.convert("L")


@contextmanager
def _decoded(source: Path | bytes, origin: str) -> Iterator[tuple["Image", list[str]]]:
    """Yield the first frame with its pixels loaded, and turn every failure of PIL into a sentence."""
    require_pillow()
    from PIL import Image, UnidentifiedImageError

    try:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
    except OSError as error:
        raise DataError(f"{origin} cannot be read: {error.strerror or error}.") from None
    if not size:
        raise DataError(f"{origin} is empty (0 bytes); remove it or fetch it again.")
    if size > MAX_FILE_BYTES:
        raise DataError(f"{origin} has {size >> 20} MiB; pictures may have {MAX_FILE_BYTES >> 20} MiB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, and of sizes, which are looked at here
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as image:
                _check_size(image, origin)
                notes = ["first frame of an animation"] if getattr(image, "is_animated", False) else []
                if image.format == "MPO":
                    notes = []  # a photograph with a second view or preview behind it
                if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in image.tile):
                    notes.append("16-bit")
                image.load()
                yield image, notes
    except (DataError, MissingExtraError):
        raise
    except UnidentifiedImageError:
        known = "PNG, JPEG, WebP, BMP, TIFF, GIF or AVIF"
        raise DataError(f"{origin} is no picture in a format that is read ({known}).") from None
    except Image.DecompressionBombError:
        raise DataError(f"{origin} has more pixels than the {MAX_PIXELS:,} that a picture may have.") from None
    except Exception as error:  # noqa: BLE001 - the readers of PIL raise a dozen kinds for a damaged file
        raise DataError(f"{origin} is broken ({' '.join(str(error).split())[:100] or type(error).__name__}).") from None


def _check_size(image: "Image", origin: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{origin} has {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that a picture may have; "
            "make it smaller."
        )


def _upright(image: "Image", notes: list[str]) -> tuple["Image", str | None]:
    """Return the picture turned as its EXIF data say, and the copyright notice in them."""
    from PIL import ExifTags, ImageOps

    try:
        exif = image.getexif()
        turned = exif.get(ExifTags.Base.Orientation, 1) in range(2, 9)
        notice = " ".join(str(exif.get(ExifTags.Base.Copyright) or "").replace("\0", " ").split())[:200] or None
        upright = ImageOps.exif_transpose(image) if turned else image
    except Exception:  # noqa: BLE001 - a damaged tag raises whatever the parser met
        notes.append("unreadable EXIF")
        return image, None
    if turned:
        notes.append("turned by EXIF")
    return upright, notice


def _eight_bits(image: "Image", origin: str) -> "Image":
    """Scale 16-bit grey to 8 bits; PIL would cut the values off. Colours of 16 bits it has already scaled."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{origin} has 32-bit values without a known range; save it with 8 or 16 bits.")
    return Image.fromarray(np.rint(values / _OF_16_BITS).astype(np.uint8))


def _on_white(image: "Image") -> "Image":
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
