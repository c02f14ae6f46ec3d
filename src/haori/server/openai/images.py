"""`/v1/images/generations`: pictures from text, for the `openai` client."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field

from haori.images.request import PictureRequest
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS
from haori.server.pictures.backend import PictureBackend
from haori.server.pictures.body import JsonObject, PictureBody, Read, read_body
from haori.server.pictures.drawing import Drawn, Order, draw
from haori.server.pictures.model_names import tags_of

__all__ = ["ImageFields", "order_of", "read_fields", "reply", "router"]

router = APIRouter()

_SEEDS = 1 << 32
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


class ImageFields(PictureBody):
    """What both routes for pictures take: OpenAI's fields, and those of Haori that the client sends as `extra_body`."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": ("auto", "opaque"), "stream": ("false",), "partial_images": (0,), "output_compression": (100,),
        "style": (),
    }  # fmt: skip
    without_effect: ClassVar[Mapping[str, str]] = {
        "user": "it is for abuse reports", "moderation": "nothing is moderated", "quality": "'steps' decides it",
        "safety_identifier": "it is for abuse reports",
    }  # fmt: skip

    prompt: str = Field(description="What to draw, with adapters as tags, or named by `model`.")
    model: str | None = Field(default=None, max_length=1200, description="The base, an adapter, or a blend.")
    n: int = Field(default=1, ge=1, le=1000, description="Number of pictures.")
    size: str = Field(default="auto", description="Pixels, as in 512x512; `auto` for the base's own.")
    response_format: str = Field(default="b64_json", description="`b64_json` alone: nothing is kept to be fetched.")
    output_format: str = Field(default="png", description="`png` alone.")
    seed: int | None = Field(default=None, description="Of the first picture; picture i has seed + i.")
    steps: int = Field(default=25, description="Of the sampler.")
    guidance: float | None = Field(default=None, description="CFG scale; None for the pipeline's own.")
    negative_prompt: str = Field(default="", description="What the pictures should not show.")
    sampler: str | None = Field(default=None, description="By the web UI's name; None for the base's own.")
    schedule: str = Field(default="Automatic", description="Schedule type by the web UI's name.")
    strict: bool | None = Field(default=None, description="False leaves out what cannot be used, with a warning.")

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """Return width and height.

        Raises:
            ApiError: The size is none.
        """
        if self.size == "auto":
            return None, None
        if not (found := _SIZE.fullmatch(self.size)):
            message = f"'size' cannot be {self.size[:40]!r}; give width and height in pixels, such as 512x512, or auto."
            raise ApiError(400, message, param="size", code="invalid_value")
        return int(found[1]), int(found[2])


def read_fields(request: Request, model: type[ImageFields], given: Mapping[str, Any]) -> tuple[ImageFields, Read, bool]:
    """Return the fields of a request, and whether what cannot be used is left out.

    Raises:
        ApiError: A field cannot be used.
    """
    strict = given.get("strict")
    told = (
        {True: True, False: False, "true": True, "false": False}.get(strict) if isinstance(strict, bool | str) else None
    )
    lenient = service_of(request).pictures.settings.lenient if told is None else not told
    asked, read = read_body(model, given, lenient=lenient)
    for name, value, allowed in (
        ("response_format", asked.response_format, "b64_json"), ("output_format", asked.output_format, "png"),
    ):  # fmt: skip
        if value != allowed:
            message = f"{name!r} cannot be {value[:40]!r}; pictures come as {allowed!r}."
            raise ApiError(400, message, param=name, code="unsupported_field")
    return asked, read, lenient


def order_of(
    asked: ImageFields, pictures: PictureBackend, warnings: Sequence[str], *, lenient: bool, **more: Any
) -> Order:
    """Return what a request comes to; `more` are further fields of `PictureRequest`.

    Raises:
        InputError: It cannot be drawn.
        ApiError: The size is none.
    """
    tags = "" if asked.model is None else tags_of(asked.model, pictures.base.name)
    width, height = asked.pixels
    settings: dict[str, Any] = {
        "prompt": f"{asked.prompt} {tags}" if tags else asked.prompt, "negative": asked.negative_prompt,
        "seed": secrets.randbelow(_SEEDS) if asked.seed in (None, -1) else asked.seed, "count": asked.n,
        "steps": asked.steps, "guidance": asked.guidance, "width": width, "height": height, "sampler": asked.sampler,
        "schedule": asked.schedule, "lenient": lenient,
    }  # fmt: skip
    return Order(((PictureRequest(**{**settings, **more}),),), warnings)


def reply(drawn: Drawn) -> dict[str, Any]:
    """Return the reply: OpenAI's, with the seed of each picture, how it was made, and warnings."""
    data = [
        {"b64_json": file, "seed": picture.seed, "infotext": picture.infotext}
        for picture, file in zip(drawn.pictures, drawn.files, strict=True)
    ]
    size = drawn.pictures[0].image.size
    return {
        "created": int(time.time()), "data": data, "size": f"{size[0]}x{size[1]}", "output_format": "png",
        "background": "opaque", "warnings": list(drawn.warnings),
    }  # fmt: skip


@router.post("/v1/images/generations", responses=ERRORS)
async def generations(request: Request, given: JsonObject) -> dict[str, Any]:
    """Draw pictures from text."""
    asked, read, lenient = read_fields(request, ImageFields, given)
    drawn = await draw(request, lambda pictures: order_of(asked, pictures, read.warnings, lenient=lenient), asked.model)
    return reply(drawn)
