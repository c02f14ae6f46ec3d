"""Draws a picture again from what its PNG file says, and compares the two.

On the same machine and versions they are the same to the byte: the base, the adapters, the seed and the batch's shape
are. What was replaced since (another base, a retrained adapter) is an error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import InputError, MismatchError
from haori.images.infotext import picture_infotext, read_infotext
from haori.images.passes import picture_digits
from haori.images.request import Recorded, recorded_request
from haori.images.tags import parse_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.images.generation import DrawnPicture, PictureGenerator, StepsDone

__all__ = ["Repeated", "read_recorded", "repeat"]


@dataclass(frozen=True)
class Repeated:
    """A picture that was drawn again.

    Attributes:
        picture: The new one.
        difference: How it differs from the old one, as a sentence; empty if all pixels are the same.
    """

    picture: "DrawnPicture"
    difference: str


def read_recorded(path: Path, *, lenient: bool = False) -> Recorded:
    """Read what a PNG file says about how it was made.

    Raises:
        FileFormatError: It is no PNG, or does not say so.
        InputError: What it says cannot be drawn.
    """
    origin = repr(str(path))
    return recorded_request(read_infotext(picture_infotext(path, origin), f"The text in {origin}"), lenient=lenient)


def repeat(
    path: Path,
    recorded: Recorded,
    generator: "PictureGenerator",
    *,
    init: "Image | None" = None,
    mask: "Image | None" = None,
    on_step: "Callable[[StepsDone], None] | None" = None,
) -> Repeated:
    """Draw a picture again.

    Args:
        path: Its PNG file.
        recorded: What it says.
        generator: On the base that it names.
        init: The picture that it began from, if it did.
        mask: The mask that was given, if one was.
        on_step: As for `PictureGenerator.draw`.

    Raises:
        MismatchError: The base, an adapter or a given picture is another than was used, unless the request is lenient.
        InputError: A picture is missing that it began from.
    """
    notes = _differences(recorded, generator, init, mask)
    if notes and not recorded.request.lenient:
        raise MismatchError(f"{notes[0]} --lenient draws it nevertheless.")
    for what, hashed, given in (("--init", recorded.init_hash, init), ("--mask", recorded.mask_hash, mask)):
        if hashed is not None and given is None:
            raise InputError(f"The picture was drawn from another one; give that with {what}.")
    size, place = recorded.batch
    request = replace(recorded.request, init=init, mask=mask)
    batch, generator.batch = generator.batch, size
    try:
        drawn = generator.draw([request] * size, on_step)[place]
    finally:
        generator.batch = batch
    picture = replace(drawn, notes=(*recorded.notes, *notes, *drawn.notes))
    return Repeated(picture, _compare(path, picture.image))


def _differences(
    recorded: Recorded, generator: "PictureGenerator", init: "Image | None", mask: "Image | None"
) -> list[str]:
    notes = []
    base = generator.base
    if recorded.model_hash is not None and not base.id.startswith(recorded.model_hash):
        notes.append(
            f"The picture was made with the base {recorded.model or 'unknown'!r} of hash {recorded.model_hash[:64]}, "
            f"and {base.name!r} has {base.id}."
        )
    for tag in parse_prompt(recorded.request.prompt, lenient=recorded.request.lenient).tags:
        digits = recorded.hashes.get(tag.name)
        try:
            found = generator.adapters.get(tag.name)
        except InputError:
            if not recorded.request.lenient:
                raise
            continue  # drawing says so
        if digits is not None and not found.short_hash.startswith(digits[:12]):
            notes.append(
                f"The picture was made with an adapter {tag.name!r} of hash {digits}, and the one of this name now has "
                f"{found.short_hash}."
            )
    for what, hashed, given in (("picture", recorded.init_hash, init), ("mask", recorded.mask_hash, mask)):
        if given is not None and hashed != picture_digits(given):
            notes.append(f"The {what} that was given is not the one that the picture was drawn from.")
    return notes


def _compare(path: Path, image: "Image") -> str:
    import numpy as np
    from PIL import Image as Images

    with Images.open(path, formats=("PNG",)) as opened:
        before = np.asarray(opened.convert("RGB"), dtype=np.int16)
    after = np.asarray(image.convert("RGB"), dtype=np.int16)
    if before.shape != after.shape:
        return f"It has another size than {str(path)!r}."
    apart = np.abs(before - after)
    if not apart.any():
        return ""
    return (
        f"{(apart > 0).mean():.2%} of its values differ from those of {str(path)!r}, by {apart.max()} of 255 at most."
    )
