"""Jobs, events and checkpoints as the official clients read them, and what is said beyond that."""

import time
from typing import Any, Literal

from pydantic import BaseModel, Field

from haori.jobs.fine_tuning.service import event_id
from haori.jobs.queue.records import Job, JobEvent

__all__ = ["CheckpointObject", "EventObject", "JobObject", "checkpoint_objects", "event_object", "job_object"]

_STATUS = {"paused": "queued"}  # clients know no other word for it
_FINDING = "haori_evaluation"
_MOST_VALUE = 512


class JobFailure(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobProgress(BaseModel):
    """How far a job has come."""

    step: int
    of: int
    seconds_remaining: float | None


class JobObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    paused: bool = Field(description="Held back; its status is queued then, as clients know no other word.")
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    error: JobFailure | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]] = Field(default_factory=list)
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    progress: JobProgress | None
    evaluation: dict[str, Any] | None = Field(description="The adapter beside its base on the validation file.")


class EventObject(BaseModel):
    """Something that happened in a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointObject(BaseModel):
    """A model as it was on the way."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None]


def job_object(job: Job) -> JobObject:
    """Return a job."""
    spec, result = job.spec, job.result or {}
    succeeded = job.state == "succeeded"
    wanted = spec["wanted"]
    given = {name: value for name, value in wanted["hyperparameters"].items() if name != "beta"}
    of_method = given if wanted["method"] == "supervised" else wanted["hyperparameters"]
    metadata = dict(spec["request"].get("metadata") or {})
    evaluation = result.get("evaluation")
    if evaluation is not None and len(metadata) < 16:
        metadata.setdefault(_FINDING, evaluation["finding"][:_MOST_VALUE])
    progress = _progress(job)
    left = None if progress is None else progress.seconds_remaining
    return JobObject(
        id=job.id, created_at=int(job.created), finished_at=None if job.ended is None else int(job.ended),
        model=spec["model"], fine_tuned_model=result.get("model") if succeeded else None, organization_id=job.owner,
        result_files=[result["result_file"]] if succeeded else [], seed=wanted["seed"],
        status=_STATUS.get(job.state, job.state), paused=job.state == "paused",
        trained_tokens=job.tokens if succeeded else None, training_file=spec["training_file"],
        validation_file=spec["validation_file"], hyperparameters=given,
        method={"type": wanted["method"], wanted["method"]: {"hyperparameters": of_method}},
        error=None if job.error is None else JobFailure(code=_code(job.error.kind), message=job.error.sentence),
        estimated_finish=None if left is None else int(time.time() + left), metadata=metadata or None,
        user_provided_suffix=spec["suffix"], progress=progress, evaluation=evaluation,
    )  # fmt: skip


def event_object(event: JobEvent) -> EventObject:
    """Return an event; figures of steps are named as OpenAI names them."""
    data = event.data or {}
    if event.type == "metrics" and data.get("kind") == "progress":
        data = {"step": data["step"], "total_steps": data["total_steps"], "train_loss": data["loss"],
                "epoch": data["epoch"]}  # fmt: skip
    elif event.type == "metrics" and data.get("kind") == "measured":
        values = data["values"]
        more = {name: value for name, value in values.items() if name not in ("loss", "train_loss")}
        data = {"step": data["step"], "epoch": data["epoch"], "valid_loss": values["loss"], **more}
    else:
        data = {}
    return EventObject(
        id=event_id(event), created_at=int(event.at), level=event.level, message=event.message, type=event.type,
        data=data or None,
    )  # fmt: skip


def checkpoint_objects(job: Job) -> list[CheckpointObject]:
    """Return the checkpoints that a job left, the newest first."""
    found = (job.result or {}).get("checkpoints", []) if job.state == "succeeded" else []
    return [
        CheckpointObject(
            id=f"ftckpt_{job.spec['identity']}_{held['step']}", created_at=int(held["created"]),
            fine_tuned_model_checkpoint=held["name"], fine_tuning_job_id=job.id, step_number=held["step"],
            metrics={name: value for name, value in held["metrics"].items() if value is not None},
        )
        for held in reversed(found)
    ]  # fmt: skip


def _progress(job: Job) -> JobProgress | None:
    held = job.progress
    if held is None or job.state != "running":
        return None
    return JobProgress(step=held["step"], of=held["of"], seconds_remaining=held.get("seconds_left"))


def _code(kind: str) -> str:
    """Return the class of an error as programs know codes: DataError is data_error."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")
