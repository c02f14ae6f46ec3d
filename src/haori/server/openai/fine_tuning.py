"""`/v1/fine_tuning`: jobs as OpenAI's clients make, follow and stop them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from haori.core.errors import InputError
from haori.jobs.queue.records import Job
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import jobs_of
from haori.server.openai.job_replies import (
    CheckpointObject,
    EventObject,
    JobObject,
    checkpoint_objects,
    event_object,
    job_object,
)
from haori.server.openai.job_requests import CreateJob, order_of
from haori.server.openai.replying import ERRORS

__all__ = ["router"]

router = APIRouter()

_Limit = Annotated[int, Query(ge=1, le=1000)]


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventList(BaseModel):
    """A page of events, the newest first."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointList(BaseModel):
    """A page of checkpoints, the newest first."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


@router.post("/v1/fine_tuning/jobs", responses=ERRORS)
def create_job(asked: CreateJob, request: Request) -> JobObject:
    """Put a job in the queue."""
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    job = jobs.fine_tuning.create(
        order_of(asked, request.headers.get("idempotency-key")), caller.account, quotas=caller.quotas,
        may_train=caller.need_training_of, may_use=caller.may_use,
    )  # fmt: skip
    return job_object(job)


@router.get("/v1/fine_tuning/jobs", responses=ERRORS)
def list_jobs(request: Request, after: str | None = None, limit: _Limit = 20) -> JobList:
    """List the jobs of the account, the newest first; `metadata[key]=value` chooses among them."""
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    found, more = jobs_of(request).fine_tuning.list(
        caller_of(request).account, after=after, limit=limit, metadata=wanted
    )
    return JobList(data=[job_object(job) for job in found], has_more=more)


@router.get("/v1/fine_tuning/jobs/{job_id}", responses=ERRORS)
def show_job(job_id: str, request: Request) -> JobObject:
    """Show one job."""
    return job_object(_job(request, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", responses=ERRORS)
def cancel_job(job_id: str, request: Request) -> JobObject:
    """End a job for good."""
    return _changed(request, job_id, "cancel")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", responses=ERRORS)
def pause_job(job_id: str, request: Request) -> JobObject:
    """Hold a job back; a running one saves a checkpoint first."""
    return _changed(request, job_id, "pause")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", responses=ERRORS)
def resume_job(job_id: str, request: Request) -> JobObject:
    """Let a paused job go on, from its checkpoint."""
    return _changed(request, job_id, "resume")


@router.get("/v1/fine_tuning/jobs/{job_id}/events", responses=ERRORS)
def list_events(job_id: str, request: Request, after: str | None = None, limit: _Limit = 20) -> EventList:
    """List what happened, the newest first."""
    job = _job(request, job_id)
    found, more = jobs_of(request).fine_tuning.events(job, after=after, limit=limit)
    return EventList(data=[event_object(event) for event in found], has_more=more)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", responses=ERRORS)
def list_checkpoints(job_id: str, request: Request, after: str | None = None, limit: _Limit = 10) -> CheckpointList:
    """List the checkpoints that can be asked for as models."""
    found = checkpoint_objects(_job(request, job_id))
    if after is not None:
        places = [place for place, held in enumerate(found) if held.id == after]
        if not places:
            raise InputError(f"'after' cannot be {after[:80]!r}: it is no checkpoint of the job {job_id[:80]!r}.")
        found = found[places[0] + 1 :]
    page = found[:limit]
    ends = (page[0].id, page[-1].id) if page else (None, None)
    return CheckpointList(data=page, has_more=len(found) > limit, first_id=ends[0], last_id=ends[1])


@router.api_route(
    "/v1/fine_tuning/checkpoints/{name}/permissions", methods=["GET", "POST"], responses=ERRORS, include_in_schema=False
)
@router.delete("/v1/fine_tuning/checkpoints/{name}/permissions/{permission}", responses=ERRORS, include_in_schema=False)
def permissions(name: str, request: Request) -> Response:
    """Say that there are no projects to share a checkpoint with."""
    caller_of(request)
    raise ApiError(
        404, f"Checkpoints such as {name[:120]!r} are not shared between projects here: every key of their account may "
        "use them. Make another with `haori keys create NAME --owner ACCOUNT`.", code="not_served",
    )  # fmt: skip


@router.post("/v1/fine_tuning/alpha/graders/{what}", responses=ERRORS, include_in_schema=False)
def graders(what: str, request: Request) -> Response:
    """Say that graders are not run."""
    caller_of(request)
    raise ApiError(
        404, f"Graders are not served ({what[:40]!r}): they may run code of the caller. Loops of your own over rewards "
        "are written against /api/v1.", code="not_served",
    )  # fmt: skip


def _job(request: Request, job_id: str) -> Job:
    return jobs_of(request).fine_tuning.find(job_id, caller_of(request).account)


def _changed(request: Request, job_id: str, how: Literal["cancel", "pause", "resume"]) -> JobObject:
    caller = caller_of(request)
    caller.need("train")
    _job(request, job_id)
    return job_object(getattr(jobs_of(request).store, how)(job_id, caller.account))
