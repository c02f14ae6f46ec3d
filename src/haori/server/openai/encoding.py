"""The way of texts through an encoder, once they are checked: who may ask, queues, quotas, figures, the log."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from fastapi import Request

from haori.serve.request import AdapterMix, StreamChunk
from haori.server.access import caller_of
from haori.server.contracts import Embedder
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.request_note import note_of

__all__ = ["check_inputs", "encode", "encoder_of"]


class _Encoded(Protocol):
    """What an encoder gives for some texts."""

    @property
    def tokens(self) -> Sequence[int]:
        """How many tokens each has."""


T = TypeVar("T", bound=_Encoded)


def encoder_of(request: Request, model: str, *, otherwise: str, code: str) -> Embedder:
    """Return what reads texts, if the caller may use the model.

    Args:
        request: The request.
        model: As it was asked for.
        otherwise: What a base that writes text does not do, for the sentence that says so.
        code: Of the error that says so.

    Raises:
        ApiError: The caller may not use it, or there is no encoder.
    """
    service = service_of(request)
    embedder = service.backend.embedder
    note_of(request.scope).model = model
    caller_of(request).check(model, service.base.name)
    if embedder is None:
        message = f"The base {service.base.name!r} writes text and {otherwise}; serve an encoder for that."
        raise ApiError(400, message, param="model", code=code)
    return embedder


def check_inputs(request: Request, given: Sequence[Any]) -> None:
    """Refuse no texts, too many, and empty ones.

    Raises:
        ApiError: They are.
    """
    limit = service_of(request).settings.max_prompts
    if not 0 < len(given) <= limit or not all(given):
        message = f"'input' has {len(given)} texts; one request has 1 to {limit}, none of them empty."
        raise ApiError(400, message, param="input", code="invalid_value")


async def encode(request: Request, model: str, submit: "Callable[[AdapterMix], Future[T]]") -> T:
    """Have texts read under the adapters that a model name means.

    Args:
        request: The request.
        model: As it was asked for.
        submit: Queues the texts; it runs on a preparing thread.

    Raises:
        ApiError: The caller may not use the model, or has used up a quota.
        HaoriError: There is no such model, too many wait, or the texts cannot be read.
    """
    service, caller, note = service_of(request), caller_of(request), note_of(request.scope)
    directory, prepare = service.backend.directory, service.preparation.run
    resolved = await prepare(caller.owner, lambda: caller.resolve(directory, model, service.base.name))
    note.serves, note.adapters = resolved.label, tuple(identity for identity, _ in resolved.mix)
    grant = service.quotas.open(caller.key, 1)
    meter = service.meters.begin(resolved.names, 0)
    try:
        future = await prepare(caller.owner, lambda: submit(resolved.mix))
        encoded = await until_disconnect(_result(future), request.receive)
        count = sum(encoded.tokens)
        grant.spend(count)
    finally:
        grant.close()
    service.meters.prompt_tokens.inc(count)
    meter.observe(StreamChunk(finish="stop"))
    note.prompt_tokens, note.finish = count, "stop"
    return encoded


async def _result(future: "Future[T]") -> T:
    return await asyncio.wrap_future(future)  # which cancels the one when the other is
