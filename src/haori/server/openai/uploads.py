"""`/v1/uploads`: a file in parts, which becomes one of `/v1/files` when it is completed."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from haori.core.errors import DataError, InputError
from haori.jobs.files import FileTooLargeError, StoredFile
from haori.jobs.uploads import MOST_PART_BYTES, Upload
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.form_stream import form_parts
from haori.server.lifecycle import jobs_of
from haori.server.openai.files import FileObject, expiry_of, file_object, unusable_file
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart
from haori.server.pictures.form import PartHead

__all__ = ["router"]

router = APIRouter()

_FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": {"type": "object"}}}, "required": True}}


class ExpiresAfter(RequestPart):
    """When a file is deleted by itself."""

    anchor: str
    seconds: int


class CreateUpload(RequestPart):
    """A file that is to come in parts."""

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(max_length=128)
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(RequestPart):
    """The parts, in order."""

    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = None


class UploadObject(BaseModel):
    """An upload, as the official clients read it."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None = None


class UploadPartObject(BaseModel):
    """A part that has arrived."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


@router.post("/v1/uploads", responses=ERRORS)
def create_upload(asked: CreateUpload, request: Request) -> UploadObject:
    """Begin an upload."""
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    given = asked.expires_after
    expires = None if given is None else expiry_of(given.anchor, given.seconds)
    upload = jobs.uploads.create(
        caller.account, asked.filename, asked.purpose, asked.mime_type, asked.bytes,
        most_bytes=jobs.max_file_bytes, expires_s=expires, quotas=caller.quotas,
    )  # fmt: skip
    return _shown(upload)


@router.post("/v1/uploads/{upload_id}/parts", responses=ERRORS, openapi_extra=_FORM)
async def add_part(upload_id: str, request: Request) -> UploadPartObject:
    """Take a part, at most 64 MiB."""
    uploads = jobs_of(request).uploads
    upload = await run_in_threadpool(uploads.find, upload_id, caller_of(request).account)
    if upload.status != "pending":
        raise InputError(f"The upload {upload.id!r} is {upload.status}; begin another.")
    with uploads.incoming(upload) as arriving:
        heads = 0
        async for found in form_parts(request):
            if isinstance(found, PartHead):
                heads += 1
                if found.name != "data" or heads > 1:
                    raise ApiError(400, "A part is sent as one field 'data' and nothing beside it.", param="data")
                continue
            try:
                arriving.write(found)
            except FileTooLargeError:
                most = min(MOST_PART_BYTES, upload.bytes)
                raise ApiError(413, f"A part of this upload may have {most:,} bytes.", param="data") from None
        if not heads:
            raise ApiError(400, "'data' is missing; send the bytes as a part of that name.", param="data")
        part = await run_in_threadpool(uploads.add_part, upload, arriving)
    return UploadPartObject(id=part.id, created_at=int(part.created), upload_id=upload.id)


@router.post("/v1/uploads/{upload_id}/complete", responses=ERRORS)
def complete_upload(upload_id: str, asked: CompleteUpload, request: Request) -> UploadObject:
    """Put the parts together; a training file is read through."""
    caller = caller_of(request)
    try:
        upload, file = jobs_of(request).uploads.complete(upload_id, caller.account, asked.part_ids, asked.md5)
    except DataError as error:
        raise unusable_file(error) from None
    return _shown(upload, file)


@router.post("/v1/uploads/{upload_id}/cancel", responses=ERRORS)
def cancel_upload(upload_id: str, request: Request) -> UploadObject:
    """End an upload."""
    return _shown(jobs_of(request).uploads.cancel(upload_id, caller_of(request).account))


def _shown(upload: Upload, file: StoredFile | None = None) -> UploadObject:
    return UploadObject(
        id=upload.id, bytes=upload.bytes, created_at=int(upload.created), expires_at=int(upload.expires),
        filename=upload.filename, purpose=upload.purpose, status=upload.status,
        file=None if file is None else file_object(file),
    )  # fmt: skip
