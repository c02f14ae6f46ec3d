"""The way of a request for pictures: who may ask, limits, queue, quotas, figures, the log.

Requests are read on a thread of their own and drawn on another, so that the event loop stays free. A client that leaves
takes its own job with it, wherever that is.
"""

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from haori.core.errors import HaoriError, LibraryError
from haori.images.generation import DrawnPicture
from haori.images.queue import PictureJob
from haori.images.request import PictureRequest
from haori.images.tags import parse_prompt
from haori.server.access import Caller, caller_of
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError, without_folders
from haori.server.lifecycle import service_of
from haori.server.pictures.backend import PictureBackend
from haori.server.request_note import note_of

__all__ = ["Drawn", "Order", "draw"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Order:
    """What a request comes to.

    Attributes:
        rounds: The pictures of each round, which are drawn one after the other.
        warnings: What was left out, a sentence each.
        finish: What is still to be done to each picture.
    """

    rounds: tuple[tuple[PictureRequest, ...], ...]
    warnings: Sequence[str] = ()
    finish: Callable[[DrawnPicture], DrawnPicture] = field(default=lambda picture: picture)

    @property
    def requests(self) -> tuple[PictureRequest, ...]:
        """Return the requests of all rounds."""
        return tuple(request for requests in self.rounds for request in requests)


@dataclass(frozen=True)
class Drawn:
    """What came of a request.

    Attributes:
        pictures: In order.
        files: Each as a PNG file that says how it was made, in base64.
        warnings: What was left out or should be known, a sentence each.
        interrupted: It was ended before all were drawn.
    """

    pictures: Sequence[DrawnPicture]
    files: Sequence[str]
    warnings: Sequence[str]
    interrupted: bool


async def draw(request: Request, prepare: Callable[[PictureBackend], Order], model: str | None = None) -> Drawn:
    """Draw what a request asks for.

    Args:
        request: The request; its body has been read.
        prepare: Reads it, on the preparing thread.
        model: As it was asked for; None for the base.

    Raises:
        ApiError: The caller may not use what it names, a limit is passed, or it was interrupted.
        HaoriError: It cannot be drawn.
    """
    service, caller, note = service_of(request), caller_of(request), note_of(request.scope)
    pictures = service.pictures
    note.model = model or pictures.base.name
    service.quotas.check(caller.key)
    with pictures.answering():
        ready = pictures.preparation.run(caller.owner, lambda: _prepared(pictures, caller, prepare))
        order, steps, names = await until_disconnect(_awaited(ready), request.receive)
        note.serves, note.adapters = pictures.base.name, names
        count = sum(one.count for one in order.requests)
        grant = service.quotas.open(caller.key, count)
        reason = "error"
        job = None
        try:
            grant.spend(steps)
            job = pictures.queue.submit(caller.owner, order.rounds, steps)
            found = await until_disconnect(_awaited(asyncio.wrap_future(job.pictures)), request.receive)
            drawn = await asyncio.to_thread(_finished, order, job, found)
            note.pictures = len(drawn.pictures)
            reason = "abort" if drawn.interrupted else "stop"
        except HaoriError:
            raise
        except BaseException:
            reason = "abort"
            raise
        finally:
            if job is not None:
                pictures.queue.cancel(job)
                pictures.meters.steps.inc(job.done)
                note.picture_steps = job.done
            grant.close()
            pictures.meters.ended(reason, note.started_s, names)
            note.finish = {"stop": "stop", "abort": "cancelled"}.get(reason, "error")
    pictures.meters.pictures.inc(len(drawn.pictures))
    if not drawn.pictures:
        raise ApiError(400, "The drawing was interrupted before a picture was complete.", code="interrupted")
    return drawn


def _prepared(
    pictures: PictureBackend, caller: Caller, prepare: Callable[[PictureBackend], Order]
) -> tuple[Order, int, tuple[str, ...]]:
    """Read a request and refuse what cannot be drawn, before it waits."""
    order = prepare(pictures)
    _check_limits(pictures, order.requests)
    names = _checked_names(pictures, caller, order.requests)
    return order, pictures.generator.check(order.requests), names


def _check_limits(pictures: PictureBackend, requests: Sequence[PictureRequest]) -> None:
    limits, generator = pictures.settings, pictures.generator
    count = sum(request.count for request in requests)
    if count > limits.max_pictures:
        raise ApiError(
            400, f"{count:,} pictures were asked for; one request may have {limits.max_pictures}.", param="n",
            code="invalid_value",
        )  # fmt: skip
    for request in requests:
        steps = max(request.steps, 0 if request.hires is None else request.hires.steps or 0)
        if steps > limits.max_steps:
            message = f"{steps:,} steps were asked for; this server takes {limits.max_steps} at most."
            raise ApiError(400, message, param="steps", code="invalid_value")
        width, height = request.size(generator.family.native_size, generator.size_multiple)
        scale = 1.0 if request.hires is None else request.hires.scale
        if (pixels := round(width * scale) * round(height * scale)) > limits.max_pixels:
            message = (
                f"A picture of {round(width * scale):,} x {round(height * scale):,} has {pixels:,} pixels; this server "
                f"draws {limits.max_pixels:,} at most."
            )
            raise ApiError(400, message, param="width", code="invalid_value")


def _checked_names(pictures: PictureBackend, caller: Caller, requests: Sequence[PictureRequest]) -> tuple[str, ...]:
    """Return the adapters that prompts name, where they are sure to exist, if the caller may use them and the base."""
    tags = {tag.name: None for one in requests for tag in parse_prompt(one.prompt, lenient=one.lenient).tags}
    key = caller.key
    if key is not None and "*" not in key.adapters:
        for name in (pictures.base.name, *tags):
            full = (name,) if name == pictures.base.name else _full_names(pictures, caller, name)
            if not caller.may_use(name) or not any(caller.may_use(one) for one in full):
                message = f"The API key {key.name!r} may not use {name[:120]!r}; /v1/models lists what it may use."
                raise ApiError(403, message, code="model_not_allowed", param="prompt")
    return () if any(one.lenient for one in requests) else tuple(tags)  # which may not exist


def _full_names(pictures: PictureBackend, caller: Caller, name: str) -> tuple[str, ...]:
    if not caller.may_use(name):
        return ()  # whether it exists is not told
    try:
        return pictures.catalogue.names_of(name)
    except LibraryError as error:
        # The sentence may name adapters that are hidden from this key.
        message = f"There is no adapter {name[:120]!r} that this API key may use; /v1/models lists what it may use."
        raise ApiError(404, message, code="model_not_found", param="prompt") from error


async def _awaited(future: "asyncio.Future[_T]") -> _T:
    return await future


def _finished(order: Order, job: PictureJob, found: Sequence[DrawnPicture]) -> Drawn:
    pictures = [order.finish(picture) for picture in found]
    notes = dict.fromkeys(
        without_folders(note) for note in (*order.warnings, *(n for one in pictures for n in one.notes))
    )
    if job.interrupted or job.skipped:
        notes[f"The drawing was interrupted: {len(pictures)} pictures were complete by then."] = None
    files = [base64.b64encode(picture.png()).decode() for picture in pictures]
    return Drawn(pictures, files, tuple(notes), job.interrupted)
