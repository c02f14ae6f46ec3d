"""Two pictures beside one another under what was asked for."""

import textwrap
from typing import TYPE_CHECKING

from haori.tasks.text_to_image.sheet import fitted

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["side_by_side"]

_GAP = 16
_SMALL, _LARGE = 320, 1024  # sides in pixels that a picture is shown at, at least and at most
_LINE = 20


def side_by_side(left: "Image", right: "Image", prompt: str) -> "Image":
    """Return both with `left` and `right` above them; small ones are enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [fitted(one, _SMALL, _LARGE) for one in (left, right)]
    width = sum(picture.width for picture in shown) + 3 * _GAP
    lines = textwrap.wrap(" ".join(prompt.split()), max(20, width // 9))[:4]
    top = _GAP + _LINE * (len(lines) + 1)
    sheet = Image.new("RGB", (width, top + max(picture.height for picture in shown) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP // 2 + number * _LINE), line, "black", font)
    at = _GAP
    for label, picture in zip(("left", "right"), shown, strict=True):
        draw.text((at, top - _LINE), label, "black", font)
        sheet.paste(picture, (at, top))
        at += picture.width + _GAP
    return sheet
