"""A contact sheet: every picture in the small with its caption, and the part of it that is trained on framed."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.storage import staged_file
from haori.data.pictures.captions import full_caption
from haori.data.pictures.opening import open_picture
from haori.data.pictures.row import PictureRow
from haori.data.progress import tracked

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

__all__ = ["MOST_PICTURES", "contact_sheet"]

MOST_PICTURES = 240
_CELL, _TEXT, _MARGIN, _LINE = 200, 78, 8, 14
_MOST_COLUMNS = 8
_LINES = 4
_INK, _FAINT, _FRAME, _HELD, _PRIOR = "#202020", "#707070", "#e02020", "#2060d0", "#108040"
_SHADE = 0.45
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansJP-Regular.ttf",
    "YuGothM.ttc",
    "msgothic.ttc",
    "Hiragino Sans GB.ttc",
)


def contact_sheet(rows: Sequence[PictureRow], path: Path, *, held_out: Sequence[PictureRow] = ()) -> int:
    """Write a sheet as PNG; what is cut off is shaded, and what is trained on framed.

    Args:
        rows: Pictures to train on; regularisation pictures are marked.
        path: The file to write.
        held_out: Pictures for validation, shown behind them and marked.

    Returns:
        How many pictures are on it: of more than 240, so many in even steps, and the sheet says so.

    Raises:
        DataError: `path` is no PNG.
        StorageError: It cannot be written.
    """
    from PIL import Image, ImageDraw

    if path.suffix.lower() != ".png":
        raise DataError(f"A contact sheet is a PNG file; {path.name!r} does not end in .png.")
    everything = [(row, "prior" if row.prior else "") for row in rows] + [(row, "validation") for row in held_out]
    step = max(1.0, len(everything) / MOST_PICTURES)
    shown = [everything[int(place * step)] for place in range(min(len(everything), MOST_PICTURES))]
    columns = max(1, min(_MOST_COLUMNS, len(shown)))
    height = _CELL + _TEXT + _MARGIN
    top = _LINE + 2 * _MARGIN
    size = (columns * (_CELL + _MARGIN) + _MARGIN, top + -(-len(shown) // columns) * height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    many = f"{len(shown):,} of {len(everything):,}" if len(shown) < len(everything) else f"{len(shown):,}"
    title = f"{many} pictures; framed: what is trained on"
    if _wide_font() is None and any(_is_wide(row.caption) for row, _ in shown):
        title += "; boxes stand for letters of captions that no font of this machine has"
    draw.text((_MARGIN, _MARGIN), title, _INK, font=_font())
    for place, (row, mark) in enumerate(tracked(shown, "Drawing", total=len(shown))):
        left = _MARGIN + place % columns * (_CELL + _MARGIN)
        _draw_cell(sheet, draw, row, mark, left, top + place // columns * height)
    with staged_file(path) as stage:
        sheet.save(stage, "PNG")
    return len(shown)


def _draw_cell(sheet: "Image", draw: "ImageDraw", row: PictureRow, mark: str, left: int, top: int) -> None:
    small, frame = _small(row)
    across, down = left + (_CELL - small.width) // 2, top + (_CELL - small.height) // 2
    sheet.paste(small, (across, down))
    draw.rectangle(
        [across + frame[0], down + frame[1], across + frame[2] - 1, down + frame[3] - 1], outline=_FRAME, width=2
    )
    caption = full_caption(row.caption, row.augmentation) or "(no caption)"
    what = f"{row.width} x {row.height} to {row.bucket[0]} x {row.bucket[1]}" + (
        f"  x{row.repeats}" if row.repeats > 1 else ""
    )
    lines = [(Path(row.origin).name, _INK)] + [(line, _INK) for line in _wrapped(caption, _LINES - 1)]
    colour = {"validation": _HELD, "prior": _PRIOR}.get(mark, _FAINT)
    told = {"validation": "  validation", "prior": "  regularisation"}.get(mark, "")
    for number, (line, ink) in enumerate([(what + told, colour), *lines]):
        draw.text((left, top + _CELL + 2 + number * _LINE), _fitting(line), ink, font=_font_for(line))


def _small(row: PictureRow) -> tuple["Image", tuple[int, int, int, int]]:
    """Return the picture in the small, what is cut off shaded, and the frame of what is not."""
    from PIL import Image

    image = open_picture(row.file, row.origin).image
    factor = min(_CELL / image.width, _CELL / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    across, down = (part / whole for part, whole in zip(size, row.crop.scaled, strict=True))
    box = (
        round(row.crop.left * across), round(row.crop.top * down),
        round((row.crop.left + row.bucket[0]) * across), round((row.crop.top + row.bucket[1]) * down),
    )  # fmt: skip
    shaded = Image.blend(small, Image.new("RGB", size, "white"), _SHADE)
    shaded.paste(small.crop(box), box[:2])
    return shaded, box


def _wrapped(text: str, most: int) -> list[str]:
    """Return the text in lines as wide as a cell; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer) <= _CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def _fitting(line: str) -> str:
    if _width(line) <= _CELL:
        return line
    while line and _width(f"{line}...") > _CELL:
        line = line[:-1]
    return f"{line}..."


def _width(line: str) -> float:
    return float(_font_for(line).getlength(line))


def _font_for(text: str) -> Any:
    return (_wide_font() if _is_wide(text) else None) or _font()


def _is_wide(text: str) -> bool:
    """Say whether a text has letters beyond Latin ones."""
    return any(ord(letter) > 0x2FF for letter in text)


@cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(11)


@cache
def _wide_font() -> Any:
    """Return the first known font with Japanese letters that the system has; None where it has none."""
    from PIL import ImageFont

    for name in _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, 11)
        except OSError:
            continue
    return None
