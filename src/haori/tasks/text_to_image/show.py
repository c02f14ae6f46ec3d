"""Pictures as a terminal can show them: file, size, crop and caption."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from haori.data.pictures import PictureRow

__all__ = ["picture_panels"]


def picture_panels(rows: "Sequence[PictureRow]") -> "list[RenderableType]":
    """Return a panel for each picture."""
    from rich.panel import Panel
    from rich.text import Text

    from haori.data.pictures import full_caption

    found: list[RenderableType] = []
    for row in rows:
        width, height = row.bucket
        lines = Text(full_caption(row.caption, row.augmentation) or "(no caption)")
        lines.append(
            f"\n{row.width} x {row.height} pixels, scaled to {row.crop.scaled[0]} x {row.crop.scaled[1]}, "
            f"{width} x {height} from ({row.crop.left}, {row.crop.top})",
            style="dim",
        )
        found.append(Panel(lines, title=Text(row.origin), title_align="left"))
    return found
