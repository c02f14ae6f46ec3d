"""Reads `multipart/form-data` (RFC 7578) from a body that is in memory, whose length is bounded already."""

import re
from dataclasses import dataclass, field
from email.message import Message
from typing import NamedTuple

from haori.server.errors import ApiError

__all__ = ["Form", "PartHead", "boundary_of", "read_form", "read_head"]

_MOST_PARTS = 100
_MOST_HEAD_BYTES = 8 << 10
_MOST_FIELD_BYTES = 64 << 10
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes:
        fields: Those that are text, by name.
        files: Contents of the files by name, in order.
    """

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


class PartHead(NamedTuple):
    """What the head of a part says: its name and, of a file, what the client calls that."""

    name: str
    filename: str | None


def read_form(content_type: str, body: bytes) -> Form:
    """Read a form.

    Args:
        content_type: Header of the request.
        body: Its body.

    Raises:
        ApiError: It is no such form, or a field is sent twice.
    """
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary_of(content_type))
    if len(parts) < 2 or not parts[-1].startswith(b"--") or len(parts) - 2 > _MOST_PARTS:
        raise ApiError(400, f"The form is not complete, or has more than {_MOST_PARTS} parts.")
    form = Form()
    for part in parts[1:-1]:
        _add(form, part)
    return form


def boundary_of(content_type: str) -> bytes:
    """Return what parts the form that a header announces.

    Raises:
        ApiError: It announces none.
    """
    kind = Message()
    kind["content-type"] = content_type
    boundary = str(kind.get_param("boundary") or "").encode("ascii", "replace")
    if kind.get_content_type() != "multipart/form-data" or not _BOUNDARY.fullmatch(boundary):
        raise ApiError(400, "The body must be a form, sent with the content type multipart/form-data and its boundary.")
    return boundary


def read_head(head: bytes) -> PartHead:
    """Read the head of a part.

    Raises:
        ApiError: It is too long, or has no name.
    """
    if len(head) > _MOST_HEAD_BYTES:
        raise ApiError(400, "A part of the form has no head, or a head that is too long.")
    described = Message()
    for line in head.split(b"\r\n"):
        header, _, value = line.partition(b":")
        if header.strip().lower() == b"content-disposition":
            described["content-disposition"] = value.strip().decode("utf-8", "replace")
    name = described.get_param("name", header="content-disposition")
    if not isinstance(name, str) or not name:
        raise ApiError(400, "A part of the form has no name.")
    is_file = described.get_param("filename", header="content-disposition") is not None
    return PartHead(name, described.get_filename("") if is_file else None)


def _add(form: Form, part: bytes) -> None:
    head, blank, content = part.partition(b"\r\n\r\n")
    if not blank:
        raise ApiError(400, "A part of the form has no head, or a head that is too long.")
    name, filename = read_head(head)
    if filename is not None:
        form.files.setdefault(name, []).append(content)
        return
    if name in form.fields or len(content) > _MOST_FIELD_BYTES:
        raise ApiError(400, f"The field {name[:100]!r} is sent twice, or is too long.", param=name[:100])
    try:
        form.fields[name] = content.decode()
    except UnicodeDecodeError:
        raise ApiError(400, f"The field {name[:100]!r} is not UTF-8.", param=name[:100]) from None
