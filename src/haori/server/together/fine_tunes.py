"""`/v1/fine-tunes`: jobs as Together's client makes, follows and stops them."""

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from haori.jobs.queue.records import Job
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import jobs_of
from haori.server.openai.replying import ERRORS
from haori.server.together.job_events import every_event
from haori.server.together.metrics import Chosen, metrics_of
from haori.server.together.replies import (
    CheckpointObject,
    EventObject,
    FineTuneObject,
    checkpoint_objects,
    event_objects,
    fine_tune_object,
)
from haori.server.together.requests import CreateFineTune, order_of

__all__ = ["elsewhere", "router"]

router = APIRouter()
elsewhere = APIRouter()
"""What is not served; behind every other router of this address."""

_MOST_JOBS = 1000


class FineTuneList(BaseModel):
    """The jobs of an account, the newest first; the newest 1,000 of more."""

    data: list[FineTuneObject]


class EventList(BaseModel):
    """What is said of a job, the oldest first."""

    data: list[EventObject]


class MetricList(BaseModel):
    """Figures of steps, the earliest first."""

    metrics: list[dict[str, float]]


class CheckpointList(BaseModel):
    """Checkpoints, the newest first."""

    data: list[CheckpointObject]


class Deleted(BaseModel):
    """That a job is gone."""

    message: str


@router.post("/v1/fine-tunes", responses=ERRORS)
def create_fine_tune(asked: CreateFineTune, request: Request) -> FineTuneObject:
    """Put a job in the queue."""
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    order = order_of(asked, jobs.fine_tuning, caller.account, request.headers.get("idempotency-key"))
    job = jobs.fine_tuning.create(
        order, caller.account, quotas=caller.quotas, may_train=caller.need_training_of, may_use=caller.may_use
    )
    return fine_tune_object(job)


@router.get("/v1/fine-tunes", responses=ERRORS)
def list_fine_tunes(request: Request) -> FineTuneList:
    """List the jobs of the account, the newest first."""
    found, _ = jobs_of(request).fine_tuning.list(caller_of(request).account, after=None, limit=_MOST_JOBS)
    return FineTuneList(data=[fine_tune_object(job) for job in found])


@router.get("/v1/fine-tunes/{job_id}", responses=ERRORS)
def show_fine_tune(job_id: str, request: Request) -> FineTuneObject:
    """Show one job."""
    return fine_tune_object(_job(request, job_id))


@router.post("/v1/fine-tunes/{job_id}/cancel", responses=ERRORS)
def cancel_fine_tune(job_id: str, request: Request) -> FineTuneObject:
    """End a job for good."""
    caller = caller_of(request)
    caller.need("train")
    _job(request, job_id)
    return fine_tune_object(jobs_of(request).store.cancel(job_id, caller.account))


@router.delete("/v1/fine-tunes/{job_id}", responses=ERRORS)
def delete_fine_tune(job_id: str, request: Request) -> Deleted:
    """Delete a job that has ended, with the models that it made."""
    caller = caller_of(request)
    caller.need("train")
    jobs_of(request).fine_tuning.delete(_job(request, job_id))
    return Deleted(message=f"The job {job_id!r} is deleted, with the models that it made.")


@router.get("/v1/fine-tunes/{job_id}/events", responses=ERRORS)
def list_events(job_id: str, request: Request) -> EventList:
    """List what is said of a job; the figures of its steps are in its metrics."""
    job = _job(request, job_id)
    return EventList(data=event_objects(list(every_event(jobs_of(request).store, job.id, "message"))))


@router.get("/v1/fine-tunes/{job_id}/metrics", responses=ERRORS)
def list_metrics(
    job_id: str, request: Request, global_step_from: int | None = None, global_step_to: int | None = None,
    logged_at_from: str | None = None, logged_at_to: str | None = None, resolution: int | None = None,
) -> MetricList:  # fmt: skip
    """List figures of steps, one a second at most, and of every validation."""
    job = _job(request, job_id)
    chosen = Chosen(global_step_from, global_step_to, logged_at_from, logged_at_to, resolution)
    return MetricList(metrics=metrics_of(jobs_of(request).store, job, chosen))


@router.get("/v1/fine-tunes/{job_id}/checkpoints", responses=ERRORS)
def list_checkpoints(job_id: str, request: Request) -> CheckpointList:
    """List the checkpoints that can be asked for as models."""
    return CheckpointList(data=checkpoint_objects(_job(request, job_id)))


@elsewhere.api_route(
    "/v1/fine-tunes/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], responses=ERRORS, include_in_schema=False
)
def not_served(rest: str, request: Request) -> Response:
    """Say what there is instead of what another service has."""
    caller_of(request)
    raise ApiError(
        404, f"/v1/fine-tunes/{rest[:80]} is not served here. Rows as the model sees them are told by "
        "/v1/fine-tunes/preview; jobs also by /v1/fine_tuning/jobs, for the openai client.", code="not_served",
    )  # fmt: skip


def _job(request: Request, job_id: str) -> Job:
    return jobs_of(request).fine_tuning.find(job_id, caller_of(request).account)
