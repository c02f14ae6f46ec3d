"""Jobs, events and checkpoints as Together's client reads them: the same that OpenAI's routes tell of."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from haori.jobs.queue.records import Job, JobEvent

__all__ = [
    "CheckpointObject",
    "EventObject",
    "FineTuneObject",
    "checkpoint_objects",
    "event_objects",
    "fine_tune_object",
]

_STATUS = {"queued": "queued", "paused": "pending", "running": "running", "succeeded": "completed", "failed": "error",
           "cancelled": "cancelled"}  # fmt: skip
_LEVEL = {"info": "info", "warn": "warning", "error": "error"}
_AGAIN = ("The job waits again.", "The job is tried again.")
_ENDS = {"The job succeeded.": "job_complete", "The job was cancelled.": "job_stopped", "The job was paused.":
         "job_stopped", "The job is asked to stop.": "cancel_requested",
         **dict.fromkeys(_AGAIN, "job_restarted")}  # fmt: skip
_AT_ITS_END = {"cosine": {"min_lr_ratio": 0.0, "num_cycles": 0.5}, "linear": {"min_lr_ratio": 0.0}}


class ProgressObject(BaseModel):
    """When a job is likely to be done."""

    estimate_available: bool
    seconds_remaining: int


class FineTuneObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine-tune"] = "fine-tune"
    status: str
    created_at: str
    started_at: str | None
    updated_at: str = Field(description="When its state last changed.")
    user_id: str
    model: str
    model_output_name: str = Field(description="What the model is asked for as, once the job has succeeded.")
    adapter_output_name: str
    suffix: str | None
    training_file: str
    validation_file: str | None
    training_method: dict[str, Any]
    training_type: dict[str, Any] | None = Field(description="None where rank and alpha are chosen by the data.")
    n_epochs: int | None
    n_checkpoints: int | None
    n_evals: int | None
    batch_size: int | None
    learning_rate: float | None
    lr_scheduler: dict[str, Any] | None
    warmup_ratio: float
    max_grad_norm: float
    weight_decay: float
    max_seq_length: int | None
    packing: bool = Field(default=False, description="Rows are batched by their length; none are joined.")
    random_seed: int
    from_checkpoint: str | None
    token_count: int | None
    trainingfile_numlines: int
    total_steps: int | None
    steps_completed: int | None
    progress: ProgressObject
    error: str | None = Field(description="Why it failed.")
    evaluation: dict[str, Any] | None = Field(description="The adapter beside its base on the validation file.")


class EventObject(BaseModel):
    """Something that happened in a job."""

    object: Literal["fine-tune-event"] = "fine-tune-event"
    created_at: str
    level: str
    message: str
    type: str
    step: int | None = None


class CheckpointObject(BaseModel):
    """A model as it was on the way."""

    checkpoint_type: str
    checkpoint: Literal["adapter"] = "adapter"
    created_at: str
    path: str = Field(description="What it is asked for as.")
    step: int


def fine_tune_object(job: Job) -> FineTuneObject:
    """Return a job."""
    spec, result, recipe = job.spec, job.result or {}, job.spec["recipe"]
    wanted, kept, progress = spec["wanted"], spec["request"].get("fine_tune") or {}, job.progress
    succeeded = job.state == "succeeded"
    status = "cancel_requested" if job.state == "running" and job.cancel else _STATUS[job.state]
    left = progress.get("seconds_left") if progress is not None and job.state == "running" else None
    return FineTuneObject(
        id=job.id, status=status, created_at=_time(job.created), started_at=_time_of(job.started),
        updated_at=_time(job.ended or job.started or job.created), user_id=job.owner, model=spec["model"],
        model_output_name=spec["name"]["name"], adapter_output_name=spec["name"]["name"], suffix=spec["suffix"],
        training_file=spec["training_file"], validation_file=spec["validation_file"],
        training_method=_method(recipe), training_type=_type(recipe["method"]),
        n_epochs=_number(recipe["training"]["epochs"]), n_checkpoints=wanted.get("checkpoints"),
        n_evals=kept.get("n_evals"), batch_size=_number(wanted["hyperparameters"]["batch_size"]),
        learning_rate=_number(recipe["optimizer"]["lr"]),
        lr_scheduler=_scheduler(recipe["schedule"]["kind"]),
        warmup_ratio=recipe["schedule"]["warmup_ratio"], max_grad_norm=recipe["optimizer"]["max_grad_norm"],
        weight_decay=recipe["optimizer"]["weight_decay"], max_seq_length=_number(recipe["data"]["max_length"]),
        random_seed=wanted["seed"], from_checkpoint=kept.get("from_checkpoint"),
        token_count=job.tokens if succeeded else None, trainingfile_numlines=spec["rows"],
        total_steps=None if progress is None else progress["of"],
        steps_completed=None if progress is None else progress["step"],
        progress=ProgressObject(estimate_available=left is not None, seconds_remaining=round(left or 0)),
        error=None if job.error is None else job.error.sentence, evaluation=result.get("evaluation"),
    )  # fmt: skip


def event_objects(events: Sequence[JobEvent]) -> list[EventObject]:
    """Return what is said of a job, the oldest first; an event without a type of its own has that of its phase."""
    found, phase = [], "job_start"
    for event in events:
        data = event.data or {}
        kind, what = data.get("kind"), data.get("what")
        if kind == "started":
            phase = "training_start"
        elif kind == "saved" and what != "checkpoint":
            phase = "training_complete"
        elif event.message in _AGAIN:
            phase = "job_start"
        of_its_own = {"warn": "warning", "error": "job_error"}.get(event.level) or _ENDS.get(event.message)
        if kind == "saved" and what == "checkpoint":
            of_its_own = "checkpoint_save"
        found.append(EventObject(
            created_at=_time(event.at), level=_LEVEL[event.level], message=event.message, type=of_its_own or phase,
            step=data.get("step"),
        ))  # fmt: skip
    return found


def checkpoint_objects(job: Job) -> list[CheckpointObject]:
    """Return the checkpoints that a job left, the newest first."""
    result = job.result or {}
    held = result.get("checkpoints", []) if job.state == "succeeded" else []
    return [
        CheckpointObject(
            checkpoint_type=f"{_which(one, result)} (step {one['step']})",
            created_at=_time(one["created"]), path=one["name"], step=one["step"],
        )
        for one in reversed(held)
    ]  # fmt: skip


def _which(checkpoint: dict[str, Any], result: dict[str, Any]) -> str:
    return "Final" if checkpoint["adapter"] == result["adapter"] else "Intermediate"


def _method(recipe: dict[str, Any]) -> dict[str, Any]:
    if recipe["task"] == "preference":
        return {"method": "dpo", "dpo_beta": recipe["loss"].get("beta")}
    return {"method": "sft", "train_on_inputs": recipe["data"]["train_on"] == "all"}


def _scheduler(kind: str) -> dict[str, Any] | None:
    return {"lr_scheduler_type": kind, "lr_scheduler_args": _AT_ITS_END[kind]} if kind in _AT_ITS_END else None


def _type(method: dict[str, Any]) -> dict[str, Any] | None:
    rank, alpha, target = method.get("rank"), method.get("alpha"), method["target"]
    if not isinstance(rank, int) or not isinstance(alpha, float):
        return None
    return {
        "type": "Lora", "lora_r": rank, "lora_alpha": round(alpha), "lora_dropout": _number(method["dropout"]),
        "lora_trainable_modules": target if isinstance(target, str) else ",".join(target),
    }  # fmt: skip


def _number(value: Any) -> Any:
    """Return a figure, None for one that the data decide (`auto`)."""
    return None if value == "auto" else value


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time_of(seconds: float | None) -> str | None:
    return None if seconds is None else _time(seconds)
