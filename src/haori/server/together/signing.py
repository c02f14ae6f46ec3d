"""The first step of an upload by Together's client: it says what will come, and is told where to send it.

The client sends the content without its key, as to a storage service. The address that it gets therefore holds a secret
of its own, which is good for this one content.
"""

from starlette.requests import Request
from starlette.responses import Response

from haori.server.access import Caller
from haori.server.errors import ApiError
from haori.server.jobs_service import JobService

__all__ = ["begin_signed"]

_FIELDS = ("purpose", "file_name", "file_type", "checksum")


def begin_signed(request: Request, jobs: JobService, caller: Caller, fields: dict[str, str]) -> Response:
    """Begin an upload, and redirect to where its content is sent.

    Args:
        request: The request, whose own address the redirect is made from.
        jobs: Where files are kept.
        caller: Who asks.
        fields: Of the form.

    Raises:
        ApiError: A field is unknown or missing, or the file is none of JSON lines.
        HaoriError: The account may keep nothing more, or there is no such purpose.
    """
    if wrong := next((name for name in fields if name not in _FIELDS), None):
        message = f"There is no field {wrong[:100]!r}; give {', '.join(_FIELDS)}, or a part 'file' with the content."
        raise ApiError(400, message, param=wrong[:100], code="unknown_field")
    if "purpose" not in fields:
        raise ApiError(400, "'purpose' is missing; give fine-tune.", param="purpose", code="missing_field")
    if (kind := fields.get("file_type", "jsonl")) != "jsonl":
        message = f"'file_type' cannot be {kind[:40]!r}: files of rows are taken as jsonl, one JSON object a line."
        raise ApiError(400, message, param="file_type", code="invalid_value")
    upload, secret = jobs.uploads.create_signed(
        caller.account, fields["file_name"], fields["purpose"], fields.get("checksum", ""), quotas=caller.quotas
    )
    place = f"{request.base_url}v1/uploads/{upload.id}/content?signature={secret}"
    return Response(status_code=302, headers={"location": place, "x-together-file-id": upload.id})
