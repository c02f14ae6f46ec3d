"""`/v1/embeddings`: texts as vectors, where the server has an encoder."""

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from haori.server.openai.encoding import check_inputs, encode, encoder_of
from haori.server.openai.replies import EmbeddingItem, EmbeddingReply, EmbeddingUsage
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart

__all__ = ["EmbeddingRequest", "router"]

router = APIRouter()


class EmbeddingRequest(RequestPart):
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
    embedder = encoder_of(request, asked.model, otherwise="makes no embeddings", code="embeddings_not_served")
    texts = asked.texts
    check_inputs(request, texts)
    embedded = await encode(request, asked.model, lambda mix: embedder.embed(texts, mix))
    count = sum(embedded.tokens)
    data = [
        EmbeddingItem(index=i, embedding=_written(v, asked.encoding_format)) for i, v in enumerate(embedded.vectors)
    ]
    return EmbeddingReply(data=data, model=asked.model, usage=EmbeddingUsage(prompt_tokens=count, total_tokens=count))


def _written(vector: Sequence[float], form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return [float(value) for value in vector]
