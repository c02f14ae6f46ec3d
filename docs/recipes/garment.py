"""A garment drawn with Pillow: a jumper with stripe and star, and others that it must not be taken for."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = ["GARMENTS", "PRODUCT", "Garment", "cut_out", "photograph"]

_LARGE, _SIDE = 512, 64
_INK = (44, 36, 44)
_Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Garment:
    """Colours of cloth and stripe, and whether there is a star on it."""

    cloth: _Colour
    stripe: _Colour
    star: _Colour | None


PRODUCT = "jumper"
GARMENTS = {
    PRODUCT: Garment((206, 54, 96), (250, 214, 70), (255, 255, 255)),
    "without star": Garment((206, 54, 96), (250, 214, 70), None),
    "blue": Garment((52, 104, 200), (250, 214, 70), (255, 255, 255)),
    "green, white stripe": Garment((48, 140, 84), (244, 244, 244), None),
    "grey": Garment((150, 150, 156), (60, 60, 66), (206, 54, 96)),
    "yellow": Garment((250, 206, 60), (206, 54, 96), None),
}
"""The one that is sold, and five like it; two share its colours or its form with it."""


def cut_out(garment: Garment, *, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Return the garment in RGBA, transparent around it.

    Args:
        garment: Which.
        scale: Its size; 1 fills the picture.
        shift: To the right and down from the middle, as shares of the picture.
    """
    picture = Image.new("RGBA", (_LARGE, _LARGE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return _LARGE * (0.5 + shift[0] + scale * x), _LARGE * (0.5 + shift[1] + scale * y)

    line = max(4, int(10 * scale))
    body = [(-0.13, -0.4), (0.13, -0.4), (0.28, -0.33), (0.46, 0.06), (0.32, 0.14), (0.24, -0.04), (0.24, 0.4),
            (-0.24, 0.4), (-0.24, -0.04), (-0.32, 0.14), (-0.46, 0.06), (-0.28, -0.33)]  # fmt: skip
    outline = [at(*point) for point in body]
    draw.polygon(outline, garment.cloth)
    draw.polygon([at(-0.24, 0.14), at(0.24, 0.14), at(0.24, 0.26), at(-0.24, 0.26)], garment.stripe)
    draw.line([*outline, outline[0]], _INK, line, joint="curve")
    draw.chord((*at(-0.13, -0.5), *at(0.13, -0.28)), 0, 180, (120, 30, 60), _INK, line)
    if garment.star:
        corners = [(number * math.pi / 5, 0.055 if number % 2 else 0.13) for number in range(10)]
        points = [at(far * math.sin(angle), -0.06 - far * math.cos(angle)) for angle, far in corners]
        draw.polygon(points, garment.star, _INK, max(2, line // 2))
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)


def photograph(garment: Garment, **place: object) -> Image.Image:
    """Return the garment on white; places are those of `cut_out`."""
    paper = Image.new("RGBA", (_SIDE, _SIDE), "white")
    paper.alpha_composite(cut_out(garment, **place))  # type: ignore[arg-type]
    return paper.convert("RGB")
