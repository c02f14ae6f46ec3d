"""Drawing pictures as a kind of job: many prompts overnight, each picture kept as soon as it is drawn."""

from pathlib import Path
from typing import Any

from haori.core.errors import InputError
from haori.core.events import EventSink, Said

__all__ = ["generate"]


def generate(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Draw the pictures of prompts, those that an earlier attempt drew left out; returns their files.

    Args:
        arguments: `prompts`, and `base`; each further key is one of `PictureRequest` for all of them, but for pictures
            to begin from. `dtype`, `device` and `batch` as `PictureGenerator` takes them.
        folder: Holds the pictures, in `pictures`, named by prompt, number and seed.
        on_event: Receives how far it is.

    Raises:
        HaoriError: A prompt, the base or an adapter cannot be used.
    """
    from haori.bases import find_base
    from haori.core.storage import make_folder, staged_file
    from haori.images.generation import PictureGenerator
    from haori.images.request import PictureRequest

    given = dict(arguments)
    prompts, base = given.pop("prompts"), given.pop("base")
    loading = {name: given.pop(name) for name in ("dtype", "device", "batch") if name in given}
    if not prompts or given.keys() & {"init", "mask"}:
        raise InputError("Give prompts, and no picture to begin from: a job draws from prompts alone.")
    try:
        requests = [PictureRequest(prompt, **given) for prompt in prompts]
    except TypeError as error:
        raise InputError(f"A setting of the pictures is not known: {error}.") from None
    place = make_folder(folder / "pictures")
    generator = None
    for number, request in enumerate(requests):
        if len(list(place.glob(f"{number:05d}-*.png"))) == request.count:
            continue
        generator = generator or PictureGenerator(find_base(base), **loading)
        on_event(Said(text=f"Drawing prompt {number + 1} of {len(requests)}."))
        for index, picture in enumerate(generator.draw([request])):
            with staged_file(place / f"{number:05d}-{index:03d}-{picture.seed}.png") as stage:
                stage.write_bytes(picture.png())
    return {"folder": str(place), "pictures": sorted(path.name for path in place.glob("*.png"))}
