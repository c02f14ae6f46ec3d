"""The training API's addresses for training: models, forward and backward, steps, checkpoints, and their promises."""

import asyncio
import time
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from haori.jobs.missing import MissingError
from haori.jobs.sessions.library_saves import read_library_name
from haori.jobs.sessions.records import ForwardCall, LoadCall, SaveCall, StepCall
from haori.jobs.sessions.runs import run_id
from haori.jobs.sessions.samplers import sampler_id
from haori.jobs.sessions.service import TrainingService
from haori.jobs.sessions.sources import LIBRARY
from haori.server.access import Caller, caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.tinker.decoding import read_forward
from haori.server.tinker.fields import (
    CancelFuture,
    CreateModel,
    LoadWeights,
    ModelOnly,
    OptimStep,
    RetrieveFuture,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
)
from haori.server.tinker.serving import claim_key, promised, result_of, training_of

__all__ = ["check_path", "router"]

router = APIRouter(prefix="/api/v1", tags=["training"])

_HOLD_S = 30.0
_LOOK_EVERY_S = 1.0


@router.post("/create_model")
def create_model(asked: CreateModel, request: Request) -> dict[str, Any]:
    """Begin a model: an adapter of the base with fresh weights."""
    from haori.jobs.tenants.records import AdapterSpec

    service, caller = training_of(request), _trainer(request)
    service.check_base(asked.base_model)
    service.clients.find(asked.session_id, caller.account)
    lora = asked.lora_config
    if lora is None:
        raise ApiError(
            400, "A model without lora_config would be trained whole; this server trains adapters: give lora_config.",
            param="lora_config",
        )  # fmt: skip
    _reserve_name(service, caller, asked.user_metadata)
    spec = AdapterSpec(**lora.model_dump(exclude={"type"}))
    claim_key(request, asked, run_id(asked.session_id, asked.model_seq_id))
    promise = service.runs.create(
        asked.session_id, asked.model_seq_id, caller.account, spec, _with_name(asked.user_metadata, asked.base_model)
    )
    return promised(promise)


@router.post("/get_info")
def get_info(asked: ModelOnly, request: Request) -> dict[str, Any]:
    """Tell of a model."""
    service, caller = training_of(request), _trainer(request)
    row = service.runs.row(asked.model_id, caller.account)
    base = service.base
    named = (row.user_metadata or {}).get("base_model") or base.name
    # Someone on this machine can read the tokenizer's files; others have it by the model's name.
    tokenizer = str(base.path) if caller.key is None else named
    return {
        "type": "get_info", "model_id": row.id, "is_lora": True, "lora_rank": service.runs.spec(row).get("rank"),
        "model_name": named, "optimizer_config": {"type": "adamw"},
        "model_data": {"arch": base.name, "model_name": named, "tokenizer_id": tokenizer},
    }  # fmt: skip


@router.post("/forward_backward")
async def forward_backward(request: Request) -> dict[str, Any]:
    """Add a loss's gradients to a model's; the body is a `ForwardBackwardRequest` in protobuf."""
    return await _forward(request)


@router.post("/forward")
async def forward(request: Request) -> dict[str, Any]:
    """Compute log-probabilities alone."""
    return await _forward(request, only=True)


@router.post("/optim_step")
def optim_step(asked: OptimStep, request: Request) -> dict[str, Any]:
    """Apply the gradients that a model has gathered."""
    from haori.jobs.tenants.records import AdamParams

    params = AdamParams(**asked.params.model_dump(exclude={"type"}))
    run = training_of(request).runs.find(asked.model_id, _trainer(request).account)
    return promised(run.submit(asked.seq_id, StepCall(params)))


@router.post("/save_weights")
def save_weights(asked: SaveWeights, request: Request) -> dict[str, Any]:
    """Save a model with its optimizer's state."""
    call = SaveCall(
        "training", asked.path, ttl_s=asked.ttl_seconds, overwrite=asked.overwrite, user_metadata=asked.user_metadata
    )
    run = training_of(request).runs.find(asked.model_id, _trainer(request).account)
    claim_key(request, asked)
    return promised(run.submit(asked.seq_id, call))


@router.post("/save_weights_for_sampler")
def save_for_sampler(asked: SaveForSampler, request: Request) -> dict[str, Any]:
    """Save a model's weights, or let the engine sample from them as they are now, with no file in between."""
    if asked.kind != "snapshot":
        raise ApiError(
            400, "kind='inflight' is not offered: weights that change under samples are not kept here; use "
            "kind='snapshot'.", param="kind", code="unsupported_field",
        )  # fmt: skip
    run = training_of(request).runs.find(asked.model_id, _trainer(request).account)
    sampler = None
    if asked.path is None and asked.sampling_session_seq_id is not None:
        sampler = sampler_id(asked.model_id.partition(":")[0], asked.sampling_session_seq_id)
    call = SaveCall(
        "sampler", asked.path, sampler, ttl_s=asked.ttl_seconds, overwrite=asked.overwrite,
        user_metadata=asked.user_metadata,
    )  # fmt: skip
    claim_key(request, asked)
    return promised(run.submit(asked.seq_id, call))


@router.post("/save_weights_external")
def save_weights_external(asked: SaveExternal, request: Request) -> dict[str, Any]:
    """Save a model's weights as PEFT files for a download; `external_weights_urls` says where."""
    run = training_of(request).runs.find(asked.model_id, _trainer(request).account)
    if asked.age_encryption_recipients:
        raise ApiError(
            400, "age_encryption_recipients is not offered: files are not encrypted here; leave it out, and fetch them "
            "over https.", param="age_encryption_recipients", code="unsupported_field",
        )  # fmt: skip
    claim_key(request, asked)
    return promised(run.submit(asked.seq_id, SaveCall("external", asked.path, ttl_s=asked.ttl_seconds)))


@router.post("/load_weights")
def load_weights(asked: LoadWeights, request: Request) -> dict[str, Any]:
    """Begin a model with the weights of a checkpoint, or of a library adapter (`library:NAME`)."""
    service, caller = training_of(request), _trainer(request)
    check_path(caller, asked.path)
    if asked.weights_access_token is not None:
        raise ApiError(
            400, "There are no access tokens of weights here; let the owner publish the checkpoint, and leave it out.",
            param="weights_access_token", code="unsupported_field",
        )  # fmt: skip
    call = LoadCall(asked.path, asked.optimizer)
    if asked.session_id is None or asked.model_seq_id is None:
        if asked.model_id is None or asked.seq_id is None:
            raise ApiError(400, "Give session_id and model_seq_id of a new model, or model_id and seq_id.")
        run = service.runs.find(asked.model_id, caller.account)
        if asked.seq_id == 1:  # any other is refused, and what is not there is said, in its turn
            with suppress(MissingError):
                call = service.runs.settled(call, caller.account)
        claim_key(request, asked)
        return promised(run.submit(asked.seq_id, call))
    if asked.base_model is not None:
        service.check_base(asked.base_model)
    service.clients.find(asked.session_id, caller.account)
    _reserve_name(service, caller, asked.user_metadata)
    identity = run_id(asked.session_id, asked.model_seq_id)
    if not service.runs.is_begun(identity, caller.account):
        call = service.runs.settled(call, caller.account)
    claim_key(request, asked, identity)
    metadata = _with_name(asked.user_metadata, asked.base_model)
    return promised(service.runs.create_from(asked.session_id, asked.model_seq_id, caller.account, call, metadata))


@router.post("/retrieve_future")
async def retrieve_future(asked: RetrieveFuture, request: Request) -> Response:
    """Return the result of a promise; the request is held for half a minute while there is none."""
    service = training_of(request)
    promise = await run_in_threadpool(service.promise, asked.request_id, caller_of(request).account)
    end = time.monotonic() + _HOLD_S
    waiting = asyncio.wrap_future(promise.future)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # an error is told as the result
    while not promise.future.done() and time.monotonic() < end:
        await asyncio.wait([waiting], timeout=_LOOK_EVERY_S)
        training_of(request)  # says so when the server ends
    if not promise.future.done():
        return Response(
            f'{{"type":"try_again","request_id":"{promise.id}","queue_state":"active"}}', media_type="application/json"
        )
    return await run_in_threadpool(result_of, promise, sizes_first=asked.allow_metadata_only)


@router.post("/cancel_future")
def cancel_future(asked: CancelFuture, request: Request) -> dict[str, Any]:
    """End samples that are no longer wanted; training goes on, since later requests rest on it."""
    training_of(request).cancel(asked.request_id, caller_of(request).account)
    return {}


def check_path(caller: Caller, path: str) -> None:
    """Refuse a library adapter that a key may not use."""
    if path.startswith(LIBRARY) and not caller.may_use(path.removeprefix(LIBRARY)):
        raise ApiError(403, f"This API key may not use {path[:200]!r}.", code="model_not_allowed", param="path")


async def _forward(request: Request, *, only: bool = False) -> dict[str, Any]:
    service, account = training_of(request), _trainer(request).account
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ApiError(415, f"The body is compressed ({encoding[:40]!r}); send it plain.")
    body = await request.body()

    def submit() -> dict[str, Any]:
        sent = read_forward(body)
        call = ForwardCall(sent.data, sent.loss, sent.config, sent.forward_only or only)
        return promised(service.runs.find(sent.model_id, account).submit(sent.seq_id, call))

    return await service_of(request).preparation.run(caller_of(request).owner, submit)


def _trainer(request: Request) -> Caller:
    caller = caller_of(request)
    caller.need_training_of(service_of(request).base.name)
    return caller


def _reserve_name(service: TrainingService, caller: Caller, metadata: dict[str, Any] | None) -> None:
    """Give the caller the name in the library that its run asks for, or refuse it."""
    name = read_library_name(metadata)
    if name is None:
        return
    if not caller.may_use(name):
        message = f"This API key may not use adapters called {name[:120]!r}, so its runs cannot save any of that name."
        raise ApiError(403, message, code="model_not_allowed", param="user_metadata")
    service.library.reserve(name, caller.account, admin=caller.admin)


def _with_name(metadata: dict[str, Any] | None, base_model: str | None) -> dict[str, Any]:
    """Return what is kept of a run beside its spec: what the client gave, and by which name it called the base."""
    return {"given": metadata, "base_model": base_model}
