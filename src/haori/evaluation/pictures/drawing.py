"""Draws the same prompts and seeds by the base and by adapters, in one go with one progress bar."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from haori.images.drawing_bar import drawing_bar
from haori.images.infotext import read_infotext
from haori.images.request import PictureRequest

if TYPE_CHECKING:
    from haori.evaluation.pictures.asking import Asked, PictureOptions
    from haori.images.generation import DrawnPicture, PictureGenerator

__all__ = ["BASE", "draw_systems", "drawn_with", "requests_of"]

BASE = "base"
_SETTINGS = ("Steps", "Sampler", "CFG scale", "Size", "Dtype")


def requests_of(
    asked: "Sequence[Asked]", systems: Mapping[str, str], options: "PictureOptions"
) -> dict[str, list[list[PictureRequest]]]:
    """Return, by system, the requests of each set of prompts; checked, before anything is loaded.

    Args:
        asked: Sets of prompts.
        systems: The tag of each system by its name, empty for the base.
        options: Steps and guidance.

    Raises:
        InputError: A prompt or a setting cannot be used.
    """
    return {
        name: [
            [
                PictureRequest(
                    f"{prompt} {tag}" if tag else prompt, seed=one.seed_of(number * one.seeds), count=one.seeds,
                    steps=options.steps, guidance=options.guidance,
                )
                for number, prompt in enumerate(one.prompts)
            ]
            for one in asked
        ]
        for name, tag in systems.items()
    }  # fmt: skip


def draw_systems(
    generator: "PictureGenerator", requests: Mapping[str, list[list[PictureRequest]]]
) -> "dict[str, list[list[DrawnPicture]]]":
    """Return, by system, the pictures of each set of prompts.

    Args:
        generator: With the base, and the adapters that the tags name.
        requests: What `requests_of` returned.

    Raises:
        HaoriError: An adapter or a prompt cannot be used, or what was computed is not finite.
    """
    flat = [one for sets in requests.values() for some in sets for one in some]
    with drawing_bar() as on_step:
        drawn = iter(generator.draw(flat, on_step))
    return {
        name: [[next(drawn) for request in some for _ in range(request.count)] for some in sets]
        for name, sets in requests.items()
    }


def drawn_with(picture: "DrawnPicture") -> dict[str, str]:
    """Return how a picture was drawn, with what the base chose itself, as infotext calls it."""
    read = read_infotext(picture.infotext).settings
    return {name: read[name] for name in _SETTINGS if name in read}
