"""What the routes of the training API share: the service, and results as the client reads them."""

import json
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from haori.core.errors import InputError, OverloadedError, UnavailableError
from haori.jobs.sessions.records import Promise
from haori.jobs.sessions.service import TrainingService
from haori.server.access import caller_of
from haori.server.errors import ApiError, without_folders
from haori.server.lifecycle import service_of
from haori.server.tinker.encoding import write_loss_output, write_sampled
from haori.server.tinker.fields import Sample

__all__ = ["OWNED", "check_scope", "claim_key", "key_of", "promised", "result_of", "training_of"]

_PROTOBUF = "application/x-protobuf"
OWNED = "owned"
_LARGE = 4 << 20  # a larger result is announced with its size first, if the client wishes


def training_of(request: Request) -> TrainingService:
    """Return the training service.

    Raises:
        ApiError: The server loads or ends (503).
    """
    service = service_of(request)
    assert service.training is not None  # its routes are there only then
    service.backend  # noqa: B018 - raises while it is loaded, and when the server ends
    return service.training


def key_of(request: Request) -> str | None:
    """Return the key by which a client marks a request that it may send again."""
    return request.headers.get("x-idempotency-key")


def claim_key(request: Request, asked: BaseModel, made: str | None = None) -> None:
    """Note what a request makes, before it is made: by its key, and by the name of what is made, where it has one.

    Raises:
        InputError: The key, or the name, was used for another request of this account.
    """
    service, account, key = training_of(request), caller_of(request).account, key_of(request)
    said = f"{request.url.path}\n{asked.model_dump_json()}"
    if key is not None:
        service.keys.claim(account, key, said)
    if made is not None:
        service.keys.claim(account, made, said)


def check_scope(access_scope: str) -> None:
    """Refuse to list what belongs to other accounts.

    Raises:
        ApiError: That was asked for (400).
    """
    if access_scope != OWNED:
        raise ApiError(
            400, f"access_scope={access_scope[:40]!r} is not offered: an account sees what is its own; leave it out. "
            "Of a checkpoint that is published, get_weights_info_by_tinker_path tells.", param="access_scope",
        )  # fmt: skip


def promised(promise: Promise) -> dict[str, Any]:
    """Return the answer to a request whose result will come."""
    answer: dict[str, Any] = {"request_id": promise.id}
    if promise.run is not None:
        answer["model_id"] = promise.run
    if promise.samples:
        answer["sample_sequence_ids"] = list(promise.samples)
    return answer


def result_of(promise: Promise, *, sizes_first: bool) -> Response:
    """Return the result of a promise that is kept: in protobuf where the client reads that, or an error as JSON."""
    error = promise.future.exception()
    if error is not None:
        if isinstance(error, OverloadedError | UnavailableError):
            raise ApiError(410, without_folders(str(error)), code="promise_lost")
        promise.mark_retrieved()
        category = "user" if isinstance(error, InputError) else "server"
        return JSONResponse({"error": without_folders(str(error)), "category": category})
    found = promise.future.result()
    if isinstance(found, dict):
        body, kind = json.dumps(found).encode(), "application/json"
    elif promise.samples:
        asked: Sample = promise.call.asked
        body, kind = write_sampled(
            found, prompt_logprobs=bool(asked.prompt_logprobs), top_prompt=asked.topk_prompt_logprobs,
            top_sampled=asked.topk_sample_logprobs, last=asked.prompt_logprobs_last_n, targets=promise.call.table,
        ), _PROTOBUF  # fmt: skip
    else:
        body, kind = write_loss_output(found), _PROTOBUF
    if sizes_first and len(body) > _LARGE:
        return JSONResponse({"status": "complete_metadata", "response_payload_size": len(body)})
    promise.mark_retrieved()
    return Response(body, media_type=kind)
