"""The second and third step of an upload by Together's client: the content, and the file that it becomes."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from haori.core.errors import DataError
from haori.jobs.files import FileTooLargeError
from haori.server.access import caller_of
from haori.server.errors import ApiError
from haori.server.lifecycle import jobs_of
from haori.server.openai.files import FileObject, file_object, unusable_file
from haori.server.openai.replying import ERRORS

__all__ = ["router"]

router = APIRouter()

_CONTENT = {"requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string"}}}, "required": True}}


@router.put("/v1/uploads/{upload_id}/content", responses=ERRORS, openapi_extra=_CONTENT, response_class=Response)
async def put_content(upload_id: str, request: Request, signature: str = "") -> Response:
    """Take the content of an upload from whoever has its signature."""
    jobs = jobs_of(request)
    upload = await run_in_threadpool(jobs.uploads.find_signed, upload_id, signature)
    with jobs.uploads.incoming(upload, jobs.max_file_bytes) as arriving:
        async for data in request.stream():
            try:
                arriving.write(data)
            except FileTooLargeError:
                raise ApiError(413, f"A file may have {jobs.max_file_bytes:,} bytes.", code="file_too_large") from None
        await run_in_threadpool(jobs.uploads.add_part, upload, arriving)
    return Response()


@router.post("/v1/files/{file_id}/preprocess", responses=ERRORS)
def preprocess(file_id: str, request: Request) -> FileObject:
    """Make a file of what was sent; one for training is read through, and a row that cannot be used is named."""
    caller = caller_of(request)
    caller.need("train")
    try:
        _, file = jobs_of(request).uploads.complete_signed(file_id, caller.account, quotas=caller.quotas)
    except DataError as error:
        raise unusable_file(error) from None
    return file_object(file)
