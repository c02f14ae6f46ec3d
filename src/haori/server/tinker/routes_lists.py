"""The training API's addresses for looking back: runs and checkpoints, as the `tinker` command and REST client ask."""

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Row

from haori.jobs.sessions.checkpoints import given_metadata
from haori.jobs.sessions.paths import CheckpointPath
from haori.jobs.sessions.service import TrainingService
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.tinker.fields import PathOnly, TimeToLive
from haori.server.tinker.refused import reason_of
from haori.server.tinker.serving import OWNED, check_scope, training_of

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["training"])

_CHECKPOINT = "/training_runs/{run}/checkpoints/{segment}/{name}"


@router.get("/training_runs")
def training_runs(
    request: Request, limit: int = 20, offset: int = 0, access_scope: str = OWNED, project_id: str | None = None
) -> dict[str, Any]:
    """List the caller's runs, latest first."""
    service, account = _for(request)
    check_scope(access_scope)
    if project_id is not None:
        raise ApiError(400, "There are no projects here; leave project_id out.", param="project_id")
    rows, count = service.runs.list(account, limit=_page(limit), offset=max(0, offset))
    cursor = {"offset": offset, "limit": limit, "total_count": count}
    return {"training_runs": [_run(service, row) for row in rows], "cursor": cursor}


@router.get("/training_runs/{run}")
def training_run(run: str, request: Request, access_scope: str = OWNED) -> dict[str, Any]:
    """Tell of a run."""
    service, account = _for(request)
    check_scope(access_scope)
    return _run(service, service.runs.row(run, account))


@router.get("/training_runs/{run}/checkpoints")
def run_checkpoints(run: str, request: Request) -> dict[str, Any]:
    """List a run's checkpoints."""
    service, account = _for(request)
    service.runs.row(run, account)
    rows, _ = service.shelf.list(account, run=run, limit=1000)
    return {"checkpoints": [_checkpoint(row) for row in rows]}


@router.get("/checkpoints")
def checkpoints(request: Request, limit: int = 100, offset: int = 0) -> dict[str, Any]:
    """List the caller's checkpoints, newest first."""
    service, account = _for(request)
    rows, count = service.shelf.list(account, limit=_page(limit), offset=max(0, offset))
    cursor = {"offset": offset, "limit": limit, "total_count": count}
    return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor}


@router.delete(_CHECKPOINT)
def delete_checkpoint(run: str, segment: str, name: str, request: Request) -> dict[str, Any]:
    """Delete a checkpoint."""
    service, account = _for(request)
    service.shelf.delete(_path(run, segment, name), account)
    return {}


@router.put(f"{_CHECKPOINT}/ttl")
def set_ttl(run: str, segment: str, name: str, asked: TimeToLive, request: Request) -> dict[str, Any]:
    """Say how long a checkpoint is kept from now on."""
    service, account = _for(request)
    expires = None if asked.ttl_seconds is None else time.time() + asked.ttl_seconds
    service.shelf.change(_path(run, segment, name), account, expires=expires)
    return {}


@router.post(f"{_CHECKPOINT}/publish")
def publish(run: str, segment: str, name: str, request: Request) -> dict[str, Any]:
    """Let every account of this server load a checkpoint."""
    service, account = _for(request)
    service.shelf.change(_path(run, segment, name), account, published=True)
    return {}


@router.delete(f"{_CHECKPOINT}/publish")
def unpublish(run: str, segment: str, name: str, request: Request) -> dict[str, Any]:
    """Take that back."""
    service, account = _for(request)
    service.shelf.change(_path(run, segment, name), account, published=False)
    return {}


@router.post("/weights_info")
def weights_info(asked: PathOnly, request: Request) -> dict[str, Any]:
    """Tell what a checkpoint is of."""
    service, account = _for(request)
    path = CheckpointPath.parse(asked.tinker_path)
    spec = service.runs.spec(service.runs.row(path.run, service.shelf.find(path, account).owner))
    named = {name: spec.get(name) for name in ("train_unembed", "train_mlp", "train_attn")}
    return {
        "base_model": service.base.name, "is_lora": True, "lora_rank": spec.get("rank"),
        "optimizer_config": {"type": "adamw"}, **named,
    }  # fmt: skip


@router.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
def nothing(rest: str, request: Request) -> None:
    """Say why an address is not answered."""
    reason = reason_of(request.method, rest)
    if reason is not None:
        raise ApiError(400, reason, code="not_offered")
    message = f"This server does not answer {request.method} /api/v1/{rest[:200]}; the guide lists what it answers."
    raise ApiError(404, message, code="not_found")


def _for(request: Request) -> tuple[TrainingService, str]:
    caller = caller_of(request)
    caller.need("train")
    return training_of(request), caller.account


def _path(run: str, segment: str, name: str) -> CheckpointPath:
    return CheckpointPath.parse(f"tinker://{run}/{segment}/{name}")


def _run(service: TrainingService, row: "Row[Any]") -> dict[str, Any]:
    rows, _ = service.shelf.list(row.owner, run=row.id, limit=1000)
    latest = {
        kind: next((_checkpoint(one) for one in rows if one.kind == kind), None) for kind in ("training", "sampler")
    }
    said = row.user_metadata or {}
    return {
        "training_run_id": row.id, "base_model": said.get("base_model") or row.base, "model_owner": row.owner,
        "is_lora": True, "lora_rank": service.runs.spec(row).get("rank"), "last_request_time": _time(row.last_request),
        "last_checkpoint": latest["training"], "last_sampler_checkpoint": latest["sampler"],
        "user_metadata": said.get("given"),
    }  # fmt: skip


def _checkpoint(row: "Row[Any]") -> dict[str, Any]:
    path = CheckpointPath.parse(f"tinker://{row.id}")
    return {
        "checkpoint_id": path.short, "checkpoint_type": row.kind, "time": _time(row.created), "tinker_path": str(path),
        "size_bytes": row.bytes, "public": row.published, "user_metadata": given_metadata(row),
        "expires_at": None if row.expires is None else _time(row.expires),
    }  # fmt: skip


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _page(limit: int) -> int:
    if not 1 <= limit <= 1000:
        raise ApiError(400, f"'limit' is {limit}; ask for 1 to 1000.", param="limit", code="invalid_value")
    return limit
