"""`/v1/images/edits`: a picture drawn anew, as a whole or where a mask is transparent, for the `openai` client."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field

from haori.data.pictures.opening import open_picture
from haori.images.masks import sized
from haori.server.errors import ApiError
from haori.server.openai.images import ImageFields, order_of, read_fields, reply
from haori.server.openai.replying import ERRORS
from haori.server.pictures.backend import PictureBackend
from haori.server.pictures.drawing import Order, draw
from haori.server.pictures.form import Form, read_form
from haori.server.pictures.given import openai_mask

__all__ = ["router"]

router = APIRouter()

_IMAGES = ("image", "image[]")
_FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": {"type": "object"}}}, "required": True}}


class EditFields(ImageFields):
    """What the route takes beside its pictures."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ImageFields.unserved, "input_fidelity": ()}

    strength: float = Field(default=0.75, description="How much of the picture is drawn anew, above 0 to 1.")


@router.post("/v1/images/edits", responses=ERRORS, openapi_extra=_FORM)
async def edits(request: Request) -> dict[str, Any]:
    """Draw a picture anew; without a mask all of it, unless it has transparent parts itself."""
    form = read_form(request.headers.get("content-type", ""), await request.body())
    unknown = next((name for name in form.files if name not in (*_IMAGES, "mask")), None)
    if unknown is not None:
        message = f"There is no file {unknown[:100]!r}; give 'image' and, if you like, 'mask'."
        raise ApiError(400, message, param=unknown[:100], code="unknown_field")
    asked, read, lenient = read_fields(request, EditFields, form.fields)
    assert isinstance(asked, EditFields)

    def prepare(pictures: PictureBackend) -> Order:
        given = _pictures(form, asked)
        return order_of(asked, pictures, read.warnings, lenient=lenient, strength=asked.strength, **given)

    return reply(await draw(request, prepare, asked.model))


def _pictures(form: Form, asked: EditFields) -> dict[str, Any]:
    """Return picture and mask, in the size that is asked for: what goes beyond its proportions is cut off."""
    images = [content for name in _IMAGES for content in form.files.get(name, ())]
    masks = form.files.get("mask", ())
    if len(images) != 1 or len(masks) > 1:
        message = f"{len(images)} pictures and {len(masks)} masks were sent; send one 'image' and at most one 'mask'."
        raise ApiError(400, message, param="image", code="invalid_value")
    given = open_picture(images[0], "The picture in 'image'")
    found = {"init": given.image}
    if masks:
        found["mask"] = openai_mask(open_picture(masks[0], "The picture in 'mask'"), "The picture in 'mask'")
    elif given.alpha is not None:
        found["mask"] = openai_mask(given, "The picture in 'image'")
    if "mask" in found and found["mask"].size != given.image.size:
        message = (
            f"The mask has {found['mask'].width:,} x {found['mask'].height:,} pixels and the picture "
            f"{given.image.width:,} x {given.image.height:,}; give a mask of the picture's size."
        )
        raise ApiError(400, message, param="mask", code="invalid_value")
    width, height = asked.pixels
    if width and height and width * height <= 1 << 24:
        return {name: sized(image, (width, height), "crop") for name, image in found.items()}
    return dict(found)
