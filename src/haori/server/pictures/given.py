"""Pictures that a request holds, read within bounds."""

import base64
import binascii
import re
from typing import TYPE_CHECKING

from haori.core.errors import DataError
from haori.data.pictures.opening import Picture, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["a1111_mask", "content_of", "openai_mask", "picture_of"]

_DATA_URL = re.compile(r"data:[\w/.+-]{0,100};base64,")
_ROUND_ABOVE = 128


def content_of(text: str, origin: str) -> bytes:
    """Return what base64 text stands for, with or without the beginning of a data URL.

    Raises:
        DataError: It is no base64. An address to fetch from is none either: nothing is fetched.
    """
    start = _DATA_URL.match(text)
    try:
        return base64.b64decode(text[start.end() if start else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{origin} is no base64; send the picture itself, not its address or path.") from None


def picture_of(text: str, origin: str) -> Picture:
    """Return the picture that base64 text stands for.

    Raises:
        DataError: It is none, or too large; the message begins with `origin`.
    """
    return open_picture(content_of(text, origin), origin)


def a1111_mask(given: Picture, *, rounded: bool) -> "Image":
    """Return a mask as the web UI reads it, white is drawn anew: what is opaque, or bright where all is opaque.

    Args:
        given: The picture.
        rounded: Make an alpha channel black and white.
    """
    if given.alpha is None:
        return given.image.convert("L")
    return given.alpha.point(lambda value: 255 if value > _ROUND_ABOVE else 0) if rounded else given.alpha


def openai_mask(given: Picture, origin: str) -> "Image":
    """Return a mask as OpenAI means it, white is drawn anew: what is transparent.

    Raises:
        DataError: Nothing is.
    """
    from PIL import ImageOps

    if given.alpha is None:
        raise DataError(f"{origin} has no transparent part; make transparent what is to be drawn anew.")
    return ImageOps.invert(given.alpha)
