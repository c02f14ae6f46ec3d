"""A small figure drawn with Pillow: one body, any pose, any clothes, so that a character and its like can be made."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = ["CHARACTERS", "HERO", "MANNEQUIN", "POSES", "Clothes", "Pose", "draw_figure"]

_LARGE, _SIDE = 512, 64  # drawn large and reduced
_INK = (40, 34, 40)


@dataclass(frozen=True)
class Pose:
    """Angles in degrees, 0 down and 90 to the right of the picture; upper and lower part of each limb.

    Attributes:
        left_arm: Upper arm and forearm of the arm on the left of the picture.
        right_arm: That of the other.
        left_leg: Thigh and shin on the left.
        right_leg: On the right.
        lean: Of the body from upright, to the right.
        height: How far the figure is lifted, as a share of the picture.
    """

    left_arm: tuple[float, float]
    right_arm: tuple[float, float]
    left_leg: tuple[float, float]
    right_leg: tuple[float, float]
    lean: float = 0.0
    height: float = 0.0


POSES = {
    "standing": Pose((-25, -10), (25, 10), (-10, -5), (10, 5)),
    "waving": Pose((-25, -10), (120, 175), (-10, -5), (10, 5)),
    "arms wide": Pose((-90, -90), (90, 90), (-14, -8), (14, 8)),
    "walking": Pose((-45, -20), (40, 75), (-32, -42), (34, 12)),
    "jumping": Pose((-135, -160), (135, 160), (-55, 20), (55, -20)),
    "sitting": Pose((-30, 20), (30, -20), (-85, -5), (85, 5), height=-0.06),
    "pointing": Pose((-25, -10), (95, 95), (-10, -5), (10, 5)),
    "leaning": Pose((-20, -5), (60, 40), (-10, -5), (10, 5), lean=18),
    # These are not shown in training.
    "arms up": Pose((-155, -170), (155, 170), (-10, -5), (10, 5)),
    "kicking": Pose((-60, -80), (40, 60), (-6, -4), (78, 82), lean=-10),
    "bowing": Pose((-10, 5), (20, 35), (-8, -4), (8, 4), lean=38),
    "dancing": Pose((-120, -60), (60, 130), (-8, -4), (50, -30), lean=-8),
}
"""Twelve, the last four of which are held out."""


@dataclass(frozen=True)
class Clothes:
    """Colours of a character, and its ears.

    Attributes:
        skin: Of head and hands.
        hair: Of cap or ears.
        coat: Of body and upper arms.
        trousers: Of the legs.
        ears: `round`, `pointed`, or `none` for a cap.
        face: Whether it has eyes and a mouth.
    """

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    coat: tuple[int, int, int]
    trousers: tuple[int, int, int]
    ears: str
    face: bool = True


HERO = "hako"
CHARACTERS = {
    HERO: Clothes((255, 214, 150), (226, 98, 38), (24, 148, 140), (92, 62, 40), "pointed"),
    "same clothes, cap": Clothes((255, 214, 150), (60, 60, 160), (24, 148, 140), (92, 62, 40), "none"),
    "red coat": Clothes((255, 214, 150), (226, 98, 38), (200, 40, 52), (60, 60, 70), "pointed"),
    "bear": Clothes((176, 120, 72), (120, 76, 40), (250, 200, 60), (60, 90, 170), "round"),
    "green cap": Clothes((240, 190, 150), (50, 140, 60), (240, 240, 240), (50, 60, 120), "none"),
    "mouse": Clothes((200, 200, 206), (150, 150, 160), (150, 90, 180), (240, 240, 240), "round"),
}
"""The one that is taught, and five that it must not be taken for; two of them share something with it."""
MANNEQUIN = Clothes((172, 172, 172), (150, 150, 150), (150, 150, 150), (128, 128, 128), "none", face=False)

_Point = tuple[float, float]


def draw_figure(clothes: Clothes, pose: Pose, *, scale: float = 1.0, shift: _Point = (0.0, 0.0)) -> Image.Image:
    """Return the figure on white.

    Args:
        clothes: Who it is.
        pose: What it does.
        scale: Of the figure.
        shift: To the right and down, as shares of the picture.
    """
    picture = Image.new("RGB", (_LARGE, _LARGE), "white")
    draw = ImageDraw.Draw(picture)
    unit = _LARGE * scale
    hips = (_LARGE * (0.5 + shift[0]), _LARGE * (0.66 + shift[1]) - unit * pose.height)
    neck = _towards(hips, 180 - pose.lean, 0.24 * unit)
    for angles, side in ((pose.left_leg, -1), (pose.right_leg, 1)):
        start = (hips[0] + side * 0.055 * unit, hips[1])
        knee = _towards(start, angles[0], 0.13 * unit)
        foot = _towards(knee, angles[1], 0.12 * unit)
        _limb(draw, [start, knee, foot], clothes.trousers, 0.085 * unit)
        _disc(draw, foot, 0.055 * unit, _INK)
    for angles, side in ((pose.left_arm, -1), (pose.right_arm, 1)):
        start = _towards(neck, 90 * side - pose.lean, 0.07 * unit)
        start = (start[0], start[1] + 0.03 * unit)
        elbow = _towards(start, angles[0], 0.12 * unit)
        hand = _towards(elbow, angles[1], 0.11 * unit)
        _limb(draw, [start, elbow, hand], clothes.coat, 0.07 * unit)
        _disc(draw, hand, 0.047 * unit, clothes.skin)
    _limb(draw, [hips, neck], clothes.coat, 0.19 * unit)
    _head(draw, clothes, _towards(neck, 180 - pose.lean, 0.14 * unit), unit)
    return picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)


def _head(draw: ImageDraw.ImageDraw, clothes: Clothes, centre: _Point, unit: float) -> None:
    radius = 0.155 * unit
    x, y = centre
    if clothes.ears == "pointed":
        for side in (-1, 1):
            ear = [(x + side * 0.15 * radius, y - 0.8 * radius), (x + side * 1.15 * radius, y - 1.6 * radius),
                   (x + side * 1.0 * radius, y - 0.3 * radius)]  # fmt: skip
            draw.polygon(ear, clothes.hair, _INK, max(1, int(0.012 * unit)))
    if clothes.ears == "round":
        for side in (-1, 1):
            _disc(draw, (x + side * 0.8 * radius, y - 0.75 * radius), 0.45 * radius, clothes.hair)
    _disc(draw, centre, radius, clothes.skin)
    top = (x - radius, y - radius, x + radius, y + radius)
    draw.chord(top, 195, 345, clothes.hair, _INK, max(1, int(0.01 * unit)))
    if clothes.face:
        for side in (-1, 1):
            _disc(draw, (x + side * 0.38 * radius, y + 0.12 * radius), 0.12 * radius, _INK, line=0)
        mouth = (x - 0.3 * radius, y + 0.2 * radius, x + 0.3 * radius, y + 0.65 * radius)
        draw.arc(mouth, 20, 160, _INK, max(1, int(0.014 * unit)))


def _towards(start: _Point, degrees: float, length: float) -> _Point:
    """Return the point at a distance; 0 degrees is down, 90 to the right."""
    angle = math.radians(degrees)
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _limb(draw: ImageDraw.ImageDraw, points: list[_Point], colour: tuple[int, int, int], width: float) -> None:
    for thick, paint in ((width + 10, _INK), (width, colour)):
        draw.line(points, paint, int(thick), joint="curve")
        for point in points:
            _disc(draw, point, thick / 2, paint, line=0)


def _disc(
    draw: ImageDraw.ImageDraw, centre: _Point, radius: float, colour: tuple[int, int, int], line: int = 5
) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, _INK if line else None, line)
