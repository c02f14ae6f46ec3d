"""`/v1/files`: training files, checked row by row when they arrive, and what jobs left."""

from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from haori.core.errors import DataError
from haori.jobs.files import FileTooLargeError, Incoming, StoredFile
from haori.server.access import Caller, caller_of
from haori.server.errors import ApiError, without_folders
from haori.server.form_stream import form_parts
from haori.server.jobs_service import JobService
from haori.server.lifecycle import jobs_of
from haori.server.openai.replying import ERRORS
from haori.server.pictures.form import PartHead
from haori.server.together.signing import begin_signed

__all__ = ["FileObject", "expiry_of", "file_object", "router", "unusable_file"]

router = APIRouter()

_FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": {"type": "object"}}}, "required": True}}
_BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The content.", "content": {"application/octet-stream": {}}}
}
_EXPIRES_S = range(3600, 2_592_001)
_MOST_FIELD_BYTES = 1 << 10


class FileObject(BaseModel):
    """A file, as the official clients read it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    expires_at: int | None = None
    status_details: str | None = None
    summary: dict[str, Any] | None = Field(
        default=None, description="Of a training file: its rows, and what was noted."
    )
    file_type: str | None = Field(
        default=None, serialization_alias="FileType", description="As Together's client asks."
    )
    processing_status: str | None = Field(default=None, description="Likewise; a training file was read through.")


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post("/v1/files", responses=ERRORS, openapi_extra=_FORM, response_model=FileObject)
async def create_file(request: Request) -> FileObject | Response:
    """Take a file; one for training is read through, and a row that cannot be used is named.

    A form as Together's client sends it, with a name and no file, is answered with the address to send the file to.
    """
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    quotas = caller.quotas
    most = min(jobs.max_file_bytes, quotas.bytes or jobs.max_file_bytes)
    with ExitStack() as stack:
        arrived, fields = await _receive(request, jobs, stack, most)
        if arrived is None:
            return await run_in_threadpool(begin_signed, request, jobs, caller, fields)
        expires = expiry_of(fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None))
        if fields:
            name = next(iter(fields))[:100]
            raise ApiError(
                400, f"There is no field {name!r}; give 'file' and 'purpose'.", param=name, code="unknown_field"
            )
        file = await run_in_threadpool(_keep, jobs, caller, arrived, expires)
    return file_object(file)


async def _receive(
    request: Request, jobs: JobService, stack: ExitStack, most: int
) -> tuple[Incoming | None, dict[str, str]]:
    """Write the file of a form to disk while it is read; return it with the fields beside it.

    There is none where the form says what the file is to be called when it comes.
    """
    fields: dict[str, str] = {}
    arrived: Incoming | None = None
    waiting: bytearray | None = None
    name = ""
    async for found in form_parts(request):
        if isinstance(found, PartHead):
            name = found.name
            waiting = None if found.filename is not None else bytearray()
            if found.filename is not None:
                if name != "file" or arrived is not None:
                    raise ApiError(
                        400, f"There is no file {name[:100]!r}, or it is sent twice; send one 'file'.", param=name[:100]
                    )
                arrived = stack.enter_context(jobs.files.incoming(found.filename, fields.get("purpose"), most))
            else:
                fields[name] = ""
        elif waiting is None:
            assert arrived is not None
            _write(arrived, found)
        else:
            waiting += found
            if len(waiting) > _MOST_FIELD_BYTES:
                raise ApiError(400, f"The field {name[:100]!r} is too long.", param=name[:100])
            fields[name] = waiting.decode("utf-8", "replace")
    if arrived is None and "file_name" in fields:
        return None, fields
    if arrived is None:
        raise ApiError(
            400, "'file' is missing; send the file as a part of that name.", param="file", code="missing_field"
        )
    if "purpose" not in fields:
        raise ApiError(400, "'purpose' is missing; give fine-tune.", param="purpose", code="missing_field")
    arrived.purpose = fields.pop("purpose")
    return arrived, fields


def _write(arrived: Incoming, data: bytes) -> None:
    try:
        arrived.write(data)
    except FileTooLargeError as error:
        raise ApiError(413, str(error), param="file", code="file_too_large") from None
    except DataError as error:
        raise unusable_file(error) from None


def _keep(jobs: JobService, caller: Caller, arrived: Incoming, expires_s: int | None) -> StoredFile:
    try:
        return jobs.files.keep(arrived, caller.account, expires_s=expires_s, quotas=caller.quotas)
    except DataError as error:
        raise unusable_file(error) from None


def unusable_file(error: DataError) -> ApiError:
    """Return the reply to a training file that cannot be used."""
    return ApiError(400, without_folders(str(error)), param="file", code="invalid_file_format")


def expiry_of(anchor: str | None, seconds: str | int | None) -> int | None:
    """Return how long a file is kept, in seconds; None for ever.

    Raises:
        ApiError: It is no such time.
    """
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        message = f"'expires_after.anchor' cannot be {anchor!r}; allowed is created_at."
        raise ApiError(400, message, param="expires_after.anchor", code="invalid_value")
    text = str(seconds)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) in _EXPIRES_S):
        message = f"'expires_after.seconds' cannot be {text[:40]!r}; give {_EXPIRES_S[0]:,} to {_EXPIRES_S[-1]:,}."
        raise ApiError(400, message, param="expires_after.seconds", code="invalid_value")
    return int(text)


@router.get("/v1/files", responses=ERRORS)
def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """List the files of the account."""
    caller, jobs = caller_of(request), jobs_of(request)
    found, more = jobs.files.list(
        caller.account, purpose=purpose, after=after, limit=limit, oldest_first=order == "asc"
    )
    shown = [file_object(file) for file in found]
    ends = (shown[0].id, shown[-1].id) if shown else (None, None)
    return FileList(data=shown, has_more=more, first_id=ends[0], last_id=ends[1])


@router.get("/v1/files/{file_id}", responses=ERRORS)
def show_file(file_id: str, request: Request) -> FileObject:
    """Show one file."""
    return file_object(jobs_of(request).files.find(file_id, caller_of(request).account))


@router.delete("/v1/files/{file_id}", responses=ERRORS)
def delete_file(file_id: str, request: Request) -> DeletedFile:
    """Delete a file; a job that was made with it goes on."""
    jobs_of(request).files.delete(file_id, caller_of(request).account)
    return DeletedFile(id=file_id)


@router.get("/v1/files/{file_id}/content", responses={**ERRORS, **_BYTES}, response_class=Response)
def file_content(file_id: str, request: Request) -> Response:
    """Return a file as it was sent, or as a job left it."""
    files = jobs_of(request).files
    file = files.find(file_id, caller_of(request).account)
    return FileResponse(files.path(file), media_type="application/octet-stream", filename=file.filename)


def file_object(file: StoredFile) -> FileObject:
    """Return a file as the official clients read it."""
    return FileObject(
        id=file.id, bytes=file.bytes, created_at=int(file.created), filename=file.filename, purpose=file.purpose,
        status=file.status, expires_at=None if file.expires is None else int(file.expires),
        status_details=file.status_details,
        summary=None if file.summary is None else file.summary.model_dump(mode="json"),
        file_type=None if file.summary is None else "jsonl",
        processing_status=None if file.summary is None else "COMPLETED",
    )  # fmt: skip
