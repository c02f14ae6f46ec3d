"""The training API's addresses for clients that begin: configuration, capabilities, sessions, telemetry."""

from typing import Any

from fastapi import APIRouter, Request

from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.tinker.fields import CreateSession, Finish, SessionOnly
from haori.server.tinker.serving import OWNED, check_scope, claim_key, key_of, training_of

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["training"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Say that the server is there."""
    return {"status": "ok"}


@router.post("/client/config")
def client_config() -> dict[str, bool]:
    """Say how to speak to this server: with the key itself, one chunk of rows after another."""
    return {"pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False}


@router.post("/client/dynamic_config")
def dynamic_config() -> dict[str, Any]:
    """Say what may change while a client runs."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True}


@router.get("/get_server_capabilities")
def capabilities(request: Request) -> dict[str, Any]:
    """Say which models there are: the base, by each of its names."""
    service = training_of(request)
    length = service.base.context_length
    models = [
        {"model_name": name, "max_context_length": length, "trainable": True, "sampleable": True}
        for name in service.names
    ]
    return {"supported_models": models}


@router.post("/create_session")
def create_session(asked: CreateSession, request: Request) -> dict[str, Any]:
    """Begin a session; a request that comes again gives the same one."""
    claim_key(request, asked)
    identity = training_of(request).clients.open(
        caller_of(request).account, tags=asked.tags, sdk_version=asked.sdk_version,
        user_metadata={"given": asked.user_metadata, "display_name": asked.display_name, "project": asked.project_id},
        request_key=key_of(request),
    )  # fmt: skip
    return {"type": "create_session", "session_id": identity}


@router.post("/session_heartbeat")
def heartbeat(asked: SessionOnly, request: Request) -> dict[str, str]:
    """Note that a client is there."""
    training_of(request).clients.beat(asked.session_id, caller_of(request).account)
    return {"type": "session_heartbeat"}


@router.get("/sessions")
def sessions(request: Request, limit: int = 20, offset: int = 0, access_scope: str = OWNED) -> dict[str, Any]:
    """List the caller's sessions, newest first."""
    check_scope(access_scope)
    account = caller_of(request).account
    return {"sessions": training_of(request).clients.list(account, limit=_page(limit), offset=max(offset, 0))}


@router.get("/sessions/{session_id}")
def session(session_id: str, request: Request, access_scope: str = OWNED) -> dict[str, Any]:
    """Tell of a session."""
    check_scope(access_scope)
    service, account = training_of(request), caller_of(request).account
    row = service.clients.find(session_id, account)
    runs, _ = service.runs.list(account, limit=1000, offset=0, session=session_id)
    said = row.user_metadata or {}
    return {
        "training_run_ids": [run.id for run in runs], "sampler_ids": service.samplers.of_session(session_id),
        "user_metadata": said.get("given"), "display_name": said.get("display_name"),
    }  # fmt: skip


@router.post("/sessions/{session_id}/finish")
def finish(session_id: str, request: Request, asked: Finish | None = None) -> dict[str, Any]:
    """End a session: its runs leave the memory, what it saved stays."""
    ending = {} if asked is None else asked.model_dump(include={"reason", "detail"}, exclude_none=True)
    training_of(request).end_session(session_id, caller_of(request).account, ending)
    return {}


@router.post("/telemetry")
async def telemetry(request: Request) -> dict[str, str]:
    """Take what the client tells of itself; nothing of it is kept."""
    async for _ in request.stream():
        pass
    return {"status": "accepted"}


def _page(limit: int) -> int:
    if not 1 <= limit <= 1000:
        raise ApiError(400, f"'limit' is {limit}; ask for 1 to 1000.", param="limit", code="invalid_value")
    return limit
