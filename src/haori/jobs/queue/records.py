"""What the queue hands out: a job as it stands, an event of it, and what jobs need and workers offer."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field

from haori.core.records import Record
from haori.jobs.missing import MissingError

__all__ = [
    "ENDED",
    "STATES",
    "Flags",
    "Job",
    "JobError",
    "JobEvent",
    "JobNotFoundError",
    "JobState",
    "Level",
    "Requirements",
    "WorkerSeen",
]

JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
STATES: tuple[JobState, ...] = get_args(JobState)
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")


class JobNotFoundError(MissingError):
    """There is no such job, or it belongs to another account."""


class Requirements(Record):
    """What a job needs of a worker, or what a worker has; None for any, or for no known limit."""

    device: str | None = Field(default=None, description="cpu, cuda, mps, ...: of a worker the best that it has.")
    memory_bytes: int | None = Field(default=None, ge=0, description="Memory of that device.")


class WorkerSeen(Record):
    """A worker that is there."""

    name: str
    offers: Requirements


class JobError(Record):
    """Why a job failed."""

    sentence: str
    kind: str = Field(default="HaoriError", description="Class in haori.core.errors, or JobDied.")


class Job(Record):
    """A job as it stood when it was read.

    Attributes:
        fence: Rises with every attempt; who writes with an older one writes nothing.
        folder: Folder of everything that the job keeps, absolute.
        progress: step, of, seconds_left, epoch, loss: the latest.
    """

    id: str
    owner: str
    kind: str
    state: JobState
    priority: int
    created: float
    started: float | None
    ended: float | None
    worker: str | None
    fence: int
    attempts: int
    max_attempts: int
    cancel: bool
    pause: bool
    spec: dict[str, Any]
    requirements: Requirements
    folder: Path
    rows: int
    tokens: int
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: JobError | None


class JobEvent(Record):
    """One event; `number` counts over all jobs and `n` within the job."""

    number: int
    job_id: str
    n: int
    at: float
    level: Level
    type: str = Field(description="message or metrics.")
    message: str
    data: dict[str, Any] | None = None


class Flags(NamedTuple):
    """What was asked of a running job."""

    cancel: bool
    pause: bool
