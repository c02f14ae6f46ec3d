"""What OpenAI has no routes for: an estimate, rows as the model sees them, and what was made as an archive."""

import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from haori.core.errors import InputError
from haori.jobs.fine_tuning.preview import PreviewedRow, preview
from haori.jobs.queue.estimate import Estimate, estimate
from haori.jobs.queue.records import Job
from haori.server.access import Caller, caller_of
from haori.server.jobs_service import JobService
from haori.server.lifecycle import jobs_of
from haori.server.openai.job_requests import CreateJob, order_of
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart

__all__ = ["ARCHIVE", "archive_reply", "router"]

router = APIRouter()

ARCHIVE = {"description": "A tar archive.", "content": {"application/x-tar": {}}}


class AskPreview(RequestPart):
    """Rows of a file, and the base that they are rendered for."""

    model: str
    training_file: str
    rows: int = Field(default=5, ge=1, le=50)


class PreviewList(BaseModel):
    """The first rows of a file."""

    object: Literal["list"] = "list"
    data: list[PreviewedRow]


@router.post("/v1/fine_tuning/estimate", responses=ERRORS)
def estimate_job(asked: CreateJob, request: Request) -> Estimate:
    """Say what a job is likely to take; the same body makes it."""
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    spec, tokens = jobs.fine_tuning.planned(order_of(asked), caller.account, may_use=caller.may_use)
    return estimate(jobs.store, base=spec, tokens=tokens)


@router.post("/v1/fine_tuning/preview", responses=ERRORS)
def preview_rows(asked: AskPreview, request: Request) -> PreviewList:
    """Show rows of a file token by token, with what is trained."""
    from haori.bases import find_base, load_tokenizer

    caller, jobs = caller_of(request), jobs_of(request)
    file = jobs.files.find(asked.training_file, caller.account)
    if file.summary is None or file.summary.kind != "text":
        raise InputError("'training_file' must hold conversations to be shown token by token.")
    _, spec, _ = jobs.fine_tuning.resolve_start(asked.model, caller.account, caller.may_use)
    base = find_base(spec)
    rows = preview(jobs.files.path(file), file.filename, load_tokenizer(base), asked.rows, base.context_length)
    return PreviewList(data=rows)


@router.get("/v1/fine_tuning/jobs/{job_id}/download", responses={**ERRORS, 200: ARCHIVE}, response_class=Response)
def download(job_id: str, request: Request, form: Literal["adapter", "merged"] = "adapter") -> Response:
    """Return what a job made: the adapter as PEFT files, or merged into its base."""
    caller, jobs = caller_of(request), jobs_of(request)
    return archive_reply(jobs, jobs.fine_tuning.find(job_id, caller.account), caller, form)


def archive_reply(
    jobs: JobService, job: Job, caller: Caller, form: Literal["adapter", "merged"], step: int | None = None
) -> Response:
    """Return what a job made as a tar archive.

    Args:
        jobs: Where jobs are kept.
        job: The job.
        caller: Who asks.
        form: The adapter, or its base with it.
        step: Of a checkpoint; None for the end result.

    Raises:
        InputError: The job made nothing, or is not done.
        ModelMissingError: It left no such checkpoint.
    """
    if job.state != "succeeded" or job.result is None:
        raise InputError(f"The job {job.id!r} is {job.state}; only what a succeeded one made can be downloaded.")
    asked = job.result["model"] if step is None else f"{job.result['model']}:ckpt-step-{step}"
    name = jobs.names.find(asked, caller.seen_account)
    place = _archive(name.library_name, jobs.fine_tuning.bases().get(name.base), merged=form == "merged")
    gone = BackgroundTask(place.unlink, missing_ok=True)
    which = "" if step is None else f"-step-{step}"
    called = f"{job.spec['identity']}{which}-{form}.tar"
    return FileResponse(place, media_type="application/x-tar", filename=called, background=gone)


def _archive(adapter: str, base: str | None, *, merged: bool) -> Path:
    """Write an archive of an adapter, or of its base with it; without the card, which names places of this machine."""
    from haori.library import Library, merge_stored

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "merged"
        if merged:
            merge_stored(adapter, made, base_spec=base)
        source = made if merged else Library().get(adapter).path
        handle = tempfile.NamedTemporaryFile(suffix=".tar", delete=False)  # noqa: SIM115 - deleted once it was sent
        with handle, tarfile.open(fileobj=handle, mode="w") as archive:
            for path in sorted(source.rglob("*")):
                if path.is_file() and path.name != "card.json":
                    archive.add(path, arcname=str(path.relative_to(source)))
    return Path(handle.name)
