"""`/v1/embeddings`: texts as vectors, where the server has an encoder."""

import asyncio
import base64
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field

from haori.serve.request import StreamChunk
from haori.server.access import caller_of
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.asked import Asked
from haori.server.openai.replies import EmbeddingItem, EmbeddingReply, EmbeddingUsage
from haori.server.openai.replying import ERRORS
from haori.server.request_note import note_of

__all__ = ["EmbeddingRequest", "router"]

router = APIRouter()

T = TypeVar("T")


class EmbeddingRequest(Asked):
    """Texts to embed."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dimensions": ()}

    model: str = Field(min_length=1, max_length=1000, description="The encoder or an adapter of it.")
    input: str | list[str] = Field(description="One text or several.")
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="`float` by default.")
    user: str | None = Field(default=None, description="Taken, without effect.")

    @property
    def texts(self) -> Sequence[str]:
        """Return the texts as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


@router.post("/v1/embeddings", responses=ERRORS)
async def embeddings(asked: EmbeddingRequest, request: Request) -> EmbeddingReply:
    """Embed texts."""
    service = service_of(request)
    backend = service.backend
    note_of(request.scope).model = asked.model
    caller = caller_of(request)
    caller.check(asked.model, service.base.name)
    embedder = backend.embedder
    if embedder is None:
        message = f"The base {service.base.name!r} writes text and makes no embeddings; serve an encoder for that."
        raise ApiError(400, message, param="model", code="embeddings_not_served")
    limit = service.settings.max_prompts
    if not 0 < len(asked.texts) <= limit or not all(asked.texts):
        message = f"'input' has {len(asked.texts)} texts; one request has 1 to {limit}, none of them empty."
        raise ApiError(400, message, param="input", code="invalid_value")
    prepare = service.preparation.run
    resolved = await prepare(caller.owner, lambda: caller.resolve(backend.directory, asked.model, service.base.name))
    note = note_of(request.scope)
    note.serves, note.adapters = resolved.label, tuple(identity for identity, _ in resolved.mix)
    grant = service.quotas.open(caller.key, 1)
    meter = service.meters.begin(resolved.names, 0)
    try:
        future = await prepare(caller.owner, lambda: embedder.embed(asked.texts, resolved.mix))
        embedded = await until_disconnect(_result(future), request.receive)
        counts = embedded.tokens
        grant.spend(sum(counts))
    finally:
        grant.close()
    service.meters.prompt_tokens.inc(sum(counts))
    meter.observe(StreamChunk(finish="stop"))
    note.prompt_tokens, note.finish = sum(counts), "stop"
    data = [
        EmbeddingItem(index=i, embedding=_written(v, asked.encoding_format)) for i, v in enumerate(embedded.vectors)
    ]
    usage = EmbeddingUsage(prompt_tokens=sum(counts), total_tokens=sum(counts))
    return EmbeddingReply(data=data, model=asked.model, usage=usage)


async def _result(future: "Future[T]") -> T:
    return await asyncio.wrap_future(future)  # which cancels the one when the other is


def _written(vector: Sequence[float], form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return [float(value) for value in vector]
