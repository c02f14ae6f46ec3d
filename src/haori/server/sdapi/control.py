"""How far the drawing is, ending it, and what a PNG file says of itself."""

from typing import Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from haori.core.errors import FileFormatError
from haori.images.infotext import find_infotext, read_infotext
from haori.server.access import caller_of
from haori.server.lifecycle import service_of
from haori.server.openai.replying import ERRORS
from haori.server.pictures.body import JsonObject, PictureBody, read_body
from haori.server.pictures.given import content_of

__all__ = ["router"]

router = APIRouter()

_MOST_TEXT = 64 << 10  # characters


class PngInfoFields(PictureBody):
    """A picture to read."""

    image: str = Field(description="A PNG file in base64.")


@router.get("/sdapi/v1/progress", responses=ERRORS)
async def progress(
    request: Request, skip_current_image: bool = Query(default=False, description="There is no preview either way.")
) -> dict[str, Any]:
    """Say how far the drawing is; with an API key, that of its own requests."""
    found = service_of(request).pictures.queue.progress(caller_of(request).owner)
    state = {
        "skipped": False, "interrupted": found.interrupted, "stopping_generation": False,
        "job": "drawing" if found.steps else "", "job_count": found.rounds, "job_timestamp": "0",
        "job_no": found.round, "sampling_step": found.step, "sampling_steps": found.steps,
    }  # fmt: skip
    text = f"{found.waiting} waiting" if found.waiting else None
    return {
        "progress": found.share, "eta_relative": round(found.left_s, 3), "state": state, "current_image": None,
        "textinfo": text,
    }  # fmt: skip


@router.post("/sdapi/v1/interrupt", responses=ERRORS)
async def interrupt(request: Request) -> dict[str, Any]:
    """End the drawing that runs, with an API key if it is its own; its reply has the pictures that are complete."""
    service_of(request).pictures.queue.interrupt(caller_of(request).owner)
    return {}


@router.post("/sdapi/v1/skip", responses=ERRORS)
async def skip(request: Request) -> dict[str, Any]:
    """Go on with the next round of the drawing that runs, likewise."""
    service_of(request).pictures.queue.skip(caller_of(request).owner)
    return {}


@router.post("/sdapi/v1/png-info", responses=ERRORS)
async def png_info(request: Request, given: JsonObject) -> dict[str, Any]:
    """Say how a picture was made, as its text tells; nothing of that is done."""
    caller_of(request)
    asked, _ = read_body(PngInfoFields, given, lenient=False)
    return await run_in_threadpool(_read, asked.image)


def _read(image: str) -> dict[str, Any]:
    origin = "The picture in 'image'"
    text = find_infotext(content_of(image, origin), origin)
    if text is None:
        return {"info": "", "items": {}, "parameters": {}}
    if len(text) > _MOST_TEXT:
        raise FileFormatError(f"{origin} has a text of {len(text):,} characters; {_MOST_TEXT:,} are read.")
    found: dict[str, Any] = {"info": text, "items": {"parameters": text}, "parameters": {}}
    try:
        read = read_infotext(text, "The text in the picture")
    except FileFormatError as error:
        return {**found, "warnings": [str(error)]}
    parameters = {"Prompt": read.prompt, "Negative prompt": read.negative, **read.settings}
    return {**found, "parameters": parameters}
