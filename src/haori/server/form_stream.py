"""Reads `multipart/form-data` (RFC 7578) piece by piece, for files that are never in memory as a whole."""

from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request

from haori.server.errors import ApiError
from haori.server.pictures.form import PartHead, boundary_of, read_head

__all__ = ["FormParser", "form_parts"]

_MOST_HEAD_BYTES = 8 << 10
_MOST_PARTS = 100
_INCOMPLETE = "The form is not complete: its last part has no end."


async def form_parts(request: Request) -> AsyncIterator[PartHead | bytes]:
    """Yield the head of each part of a request's form, each followed by its content in pieces.

    Raises:
        ApiError: It is no such form.
    """
    parser = FormParser(request.headers.get("content-type", ""))
    async for data in request.stream():
        for found in parser.feed(data):
            yield found
    if not parser.ended:
        raise ApiError(400, _INCOMPLETE)


class FormParser:
    """Takes a form as it arrives; at most one head, or the length of a boundary, is held back.

    Attributes:
        ended: Whether the end of the form has come; what follows it is passed over.
    """

    def __init__(self, content_type: str) -> None:
        self.ended = False
        self._mark = b"\r\n--" + boundary_of(content_type)
        self._held = b"\r\n"  # so that the first boundary looks like the others
        self._place = "before"
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[PartHead | bytes]:
        """Yield what the next bytes complete.

        Raises:
            ApiError: They are no form.
        """
        self._held += data
        while not self.ended:
            if self._place == "head":
                head = self._head()
                if head is None:
                    return
                yield head
            elif self._place == "mark":
                if not self._after_mark():
                    return
            else:
                found = self._held.find(self._mark)
                whole = found >= 0
                end = found if whole else max(0, len(self._held) - len(self._mark) + 1)
                piece, self._held = self._held[:end], self._held[end + len(self._mark) * whole :]
                if piece and self._place == "content":
                    yield piece
                if not whole:
                    return
                self._place = "mark"

    def _after_mark(self) -> bool:
        """Say whether it is known what follows a boundary: another part, or the end."""
        if len(self._held) < 2:
            return False
        if self._held.startswith(b"--"):
            self.ended, self._held = True, b""
            return True
        line = self._held.find(b"\r\n")
        if line < 0 and len(self._held) < _MOST_HEAD_BYTES:
            return False
        if self._held[: max(line, 0)].strip() or line < 0 or self._parts >= _MOST_PARTS:
            raise ApiError(400, f"The form is broken after a boundary, or has more than {_MOST_PARTS} parts.")
        self._parts += 1
        self._held, self._place = self._held[line:], "head"  # with its line break: a part may have no headers
        return True

    def _head(self) -> PartHead | None:
        head, blank, rest = self._held.partition(b"\r\n\r\n")
        if not blank and len(self._held) > _MOST_HEAD_BYTES:
            raise ApiError(400, "A part of the form has no head, or a head that is too long.")
        if not blank:
            return None
        self._held, self._place = rest, "content"
        return read_head(head)
