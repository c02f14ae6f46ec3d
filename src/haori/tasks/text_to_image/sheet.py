"""Pictures in rows and columns with labels, as one picture."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["SheetRow", "draw_sheet", "fitted"]

_GAP = 8
_LEFT = 110
_TILE = 160


class SheetRow(NamedTuple):
    """A row: what it is called, and its pictures from left to right."""

    label: str
    pictures: "Sequence[Image]"


def draw_sheet(rows: Sequence[SheetRow], titles: Sequence[str], heading: str = "") -> "Image":
    """Return the sheet in RGB.

    Args:
        rows: From top to bottom; small pictures are enlarged without smoothing.
        titles: Of the columns.
        heading: Of the whole.
    """
    from PIL import Image, ImageDraw

    font, small = _font(14), _font(12)
    shown = [[fitted(picture, _TILE, 2 * _TILE) for picture in row.pictures] for row in rows]
    width = max((picture.width for row in shown for picture in row), default=_TILE)
    heights = [max((picture.height for picture in row), default=_TILE) for row in shown]
    columns = max([len(titles), *(len(row) for row in shown)])
    wrapped = ["\n".join(textwrap.wrap(title, max(10, width // 7))[:4]) for title in titles]
    top = _GAP + (26 if heading else 0)
    head = 16 * max((title.count("\n") + 1 for title in wrapped), default=0) + _GAP
    sheet = Image.new(
        "RGB", (_LEFT + columns * (width + _GAP) + _GAP, top + head + sum(heights) + _GAP * (len(rows) + 1)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((_GAP, _GAP), heading, "black", font)
    for column, title in enumerate(wrapped):
        draw.multiline_text((_LEFT + column * (width + _GAP), top), title, "black", small, spacing=2)
    y = top + head
    for row, pictures, height in zip(rows, shown, heights, strict=True):
        draw.multiline_text((_GAP, y + height // 2 - 14), row.label, "black", font, spacing=2)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (_LEFT + column * (width + _GAP), y))
        y += height + _GAP
    return sheet


def fitted(picture: "Image", smallest: int, largest: int) -> "Image":
    """Return a picture at a size to look at; small ones are enlarged by a whole factor, without smoothing.

    Args:
        picture: Of any size.
        smallest: Longest side in pixels below which it is enlarged to about that.
        largest: Longest side in pixels that it has at most.
    """
    from PIL import Image

    longest = max(picture.size)
    if longest < smallest:
        factor = round(smallest / longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longest > largest:
        size = (max(1, picture.width * largest // longest), max(1, picture.height * largest // longest))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)
