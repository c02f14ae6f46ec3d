"""One sheet of pictures over strengths, epochs, seeds and other settings of one prompt.

The last axis runs from left to right, the others from top to bottom. An adapter of epoch 3 is looked for as training
scripts name it: `NAME-000003` beside `NAME`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError, nearest
from haori.images.request import PictureRequest
from haori.images.tags import parse_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.images.generation import DrawnPicture

__all__ = ["AXES", "Axis", "grid_requests", "grid_sheet", "parse_axes"]

AXES = ("strength", "epoch", "seed", "steps", "guidance")
_WHOLE = ("epoch", "seed", "steps")
_MOST_AXES = 3
_MOST_VALUES = 64
_MOST_PICTURES = 400
_TAG = re.compile(r"<(?:lora|lyco):[^>]+>")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_RANGE = re.compile(r"(\d{1,15})\.\.(\d{1,15})", re.ASCII)


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as they were written."""

    name: str
    values: tuple[str, ...]


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Read axes, each as `strength=0.4,0.7,1.0` or `seed=1..3` (both ends included).

    Raises:
        InputError: One cannot be read, is given twice, or they make too many pictures.
    """
    axes = tuple(_axis(text) for text in texts)
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names) or len(axes) > _MOST_AXES:
        raise InputError(f"A grid has one to {_MOST_AXES} different axes; {', '.join(names)} were given.")
    pictures = 1
    for axis in axes:
        pictures *= len(axis.values)
    if pictures > _MOST_PICTURES:
        raise InputError(f"This grid would have {pictures:,} pictures; {_MOST_PICTURES} are most.")
    return axes


def _axis(text: str) -> Axis:
    name, equals, given = text.partition("=")
    if not equals or name not in AXES:
        hint = nearest(name, AXES) or f"there are {', '.join(AXES)}, as in strength=0.4,0.7 or seed=1..3."
        raise InputError(f"The axis {text[:80]!r} of a grid is not known; {hint}")
    values: list[str] = []
    for part in given.split(","):
        if match := _RANGE.fullmatch(part.strip()):
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < _MOST_VALUES:
                raise InputError(f"The range {part.strip()!r} of {name} must rise, by {_MOST_VALUES - 1} at most.")
            values += [str(value) for value in range(first, last + 1)]
        elif _NUMBER.fullmatch(part.strip()) and not (name in _WHOLE and not part.strip().isdecimal()):
            values.append(part.strip())
        else:
            kind = "a whole number" if name in _WHOLE else "a number"
            raise InputError(f"The axis {name!r} of the grid has {part.strip()[:60]!r} where {kind} belongs.")
    if len(values) > _MOST_VALUES:
        raise InputError(f"The axis {name!r} of the grid has {len(values)} values; {_MOST_VALUES} are most.")
    return Axis(name, tuple(values))


def grid_requests(request: PictureRequest, axes: Sequence[Axis]) -> list[PictureRequest]:
    """Return a request for each cell, rows from top to bottom.

    Raises:
        InputError: The prompt has not exactly one tag, where strength or epoch is an axis; or a value cannot be used.
    """
    if request.count > 1:
        raise InputError("A grid has one picture a cell; for several seeds add an axis such as seed=1..3.")
    cells = product(*(axis.values for axis in axes))
    return [_with(request, dict(zip((axis.name for axis in axes), cell, strict=True))) for cell in cells]


def _with(request: PictureRequest, cell: dict[str, str]) -> PictureRequest:
    changes: dict[str, Any] = {name: int(cell[name]) for name in ("seed", "steps") if name in cell}
    if "guidance" in cell:
        changes["guidance"] = float(cell["guidance"])
    if "strength" in cell or "epoch" in cell:
        changes["prompt"] = _with_tag(request.prompt, cell.get("strength"), cell.get("epoch"))
    return replace(request, **changes)


def _with_tag(prompt: str, strength: str | None, epoch: str | None) -> str:
    tags, found = parse_prompt(prompt).tags, _TAG.findall(prompt)
    if len(tags) != 1 or len(found) != 1:
        raise InputError(
            f"A grid over strength or epoch changes the one adapter of a prompt, and this one names {len(tags)}; write "
            "one tag, like <lora:NAME:0.7>."
        )
    name = tags[0].name if epoch is None else f"{tags[0].name}-{int(epoch):06d}"
    arguments = found[0][1:-1].split(":")
    if strength is not None:
        return prompt.replace(found[0], f"<lora:{name}:{strength}>")
    kept = [argument for argument in arguments[1:] if argument.strip() != tags[0].name]
    return prompt.replace(found[0], f"<{':'.join(['lora', name, *kept])}>")


def grid_sheet(drawn: "Sequence[DrawnPicture]", axes: Sequence[Axis], prompt: str) -> "Image":
    """Return the pictures of `grid_requests` as one sheet with labels."""
    from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

    columns = axes[-1]
    width = len(columns.values)
    rows = []
    for number, cell in enumerate(product(*(axis.values for axis in axes[:-1]))):
        label = "\n".join(f"{axis.name} {value}" for axis, value in zip(axes[:-1], cell, strict=True))
        rows.append(SheetRow(label, [one.image for one in drawn[number * width : (number + 1) * width]]))
    heading = " ".join(prompt.split())
    heading = heading if len(heading) <= 100 else f"{heading[:99]}…"
    return draw_sheet(rows, [f"{columns.name} {value}" for value in columns.values], heading)
