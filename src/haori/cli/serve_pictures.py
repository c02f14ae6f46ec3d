"""The options of `haori serve` that are for an image base."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.server import PictureSettings

__all__ = [
    "Lenient",
    "PictureBatch",
    "PictureCount",
    "PictureDtype",
    "PictureQueued",
    "PictureSize",
    "PictureSteps",
    "check_used",
    "picture_settings",
]

PictureSize = Annotated[str, typer.Option(help="Largest picture: width x height is what counts.")]
PictureSteps = Annotated[int, typer.Option(min=1, help="Most steps of a picture.")]
PictureCount = Annotated[int, typer.Option(min=1, help="Most pictures of one request.")]
PictureQueued = Annotated[int, typer.Option(min=1, help="Requests for pictures that may wait; more get 429.")]
PictureBatch = Annotated[int, typer.Option(min=1, max=256, help="Pictures of one request that are drawn at once.")]
PictureDtype = Annotated[str | None, typer.Option(help="Format that pictures are computed in; on a CPU fp32.")]
Lenient = Annotated[
    bool, typer.Option("--lenient", help="Pictures: leave out what cannot be used, with a warning in the reply.")
]

_OF_PICTURES = (
    "picture_size",
    "picture_steps",
    "picture_count",
    "picture_queue",
    "picture_batch",
    "picture_dtype",
    "lenient",
)
_OF_TEXT = (
    "adapter_root", "max_tokens", "max_prompt_tokens", "max_batch", "max_queue", "kv_memory", "adapter_memory", "pin",
    "weights", "engine", "vllm_url", "vllm_arg", "ray", "replicas", "ray_address",
)  # fmt: skip
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def check_used(context: typer.Context, *, text: bool, pictures: bool) -> None:
    """Refuse options that are for a base which is not served.

    Raises:
        InputError: There is such an option.
    """
    from haori.core.errors import InputError

    for names, served, kind in ((_OF_TEXT, text, "a text base"), (_OF_PICTURES, pictures, "an image base")):
        for name in names:
            source = context.get_parameter_source(name)
            if not served and source is not None and source.name == "COMMANDLINE":
                option = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{option} is for {kind}, and none is served; take it out, or add the base with --base."
                )


def picture_settings(size: str, steps: int, count: int, queue: int, *, lenient: bool) -> "PictureSettings":
    """Return the limits that the options say.

    Raises:
        InputError: The size is none.
    """
    from haori.core.errors import InputError
    from haori.server import PictureSettings

    found = _SIZE.fullmatch(size)
    if found is None:
        raise InputError(f"--picture-size cannot be {size[:40]!r}; give width and height in pixels, like 1024x1024.")
    pixels = max(64, int(found[1]) * int(found[2]))
    return PictureSettings(max_pixels=pixels, max_steps=steps, max_pictures=count, max_queue=queue, lenient=lenient)
