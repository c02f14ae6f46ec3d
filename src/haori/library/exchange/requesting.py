"""One GET, followed through redirects: each address checked anew, tokens kept to their own host, all of it in time."""

import http.client
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from urllib.parse import urljoin

from haori.core.errors import DownloadError, InputError
from haori.library.exchange.connecting import Place, check_url, connect
from haori.library.exchange.messages import message_in

__all__ = ["Limits", "Reply", "get"]

_REDIRECTS = 5
_MOVED = frozenset({301, 302, 303, 307, 308})
_MESSAGE_BYTES = 64 << 10


@dataclass(frozen=True)
class Limits:
    """What a download may take.

    Attributes:
        size_bytes: Largest file.
        connect_s: Longest wait for a connection.
        headers_s: Longest wait for the whole head of a reply.
        stall_s: Length of the stretches of time in each of which `least_bytes` must come.
        least_bytes: See `stall_s`.
        total_s: Longest time for one file.
        loopback: This machine itself may be asked, over http too.
        tokens: Bearer tokens by the origin (scheme, host, port) that they are for; no other is ever sent one.
    """

    size_bytes: int = 32 << 30
    connect_s: float = 15.0
    headers_s: float = 30.0
    stall_s: float = 30.0
    least_bytes: int = 30 << 10
    total_s: float = 12 * 3600.0
    loopback: bool = False
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Reply:
    """The reply that came in the end; its body is read from `response`."""

    response: http.client.HTTPResponse
    place: Place
    sock: socket.socket

    @property
    def status(self) -> int:
        """Return the status."""
        return self.response.status

    def header(self, name: str) -> str:
        """Return a header, empty if it is not there."""
        return self.response.getheader(name) or ""

    def limit_wait(self, seconds: float) -> None:
        """Limit how long the next read may wait."""
        self.sock.settimeout(max(seconds, 0.001))

    def message(self, limits: Limits) -> str | None:
        """Return what the server says in place of a file, if it is JSON or a page."""
        said = bytearray()
        with _deadline(self.sock, limits.headers_s), suppress(OSError, ValueError, http.client.HTTPException):
            while len(said) < _MESSAGE_BYTES and (chunk := self.response.read1(_MESSAGE_BYTES)):
                said += chunk
        return message_in(bytes(said))


@contextmanager
def get(url: str, limits: Limits, headers: Mapping[str, str] | None = None) -> Iterator[Reply]:
    """Ask for a URL and yield the reply, following up to 5 redirects.

    Raises:
        InputError: The URL may not be fetched.
        DownloadError: No reply of status 200 or 206 came (or 416, to a request for a range); what the server says is
            told.
    """
    place = check_url(url, loopback=limits.loopback)
    for _ in range(_REDIRECTS + 1):
        connection = connect(place, timeout_s=limits.connect_s, loopback=limits.loopback)
        try:
            sock = connection.sock  # the connection lets go of it once a reply came that ends it
            response = _ask(connection, sock, place, limits, headers or {})
            if response.status not in _MOVED:
                reply = Reply(response, place, sock)
                _check_status(reply, limits, asked_range="Range" in (headers or {}))
                yield reply
                return
            place = _next(place, url, response.getheader("Location") or "", limits)
        finally:
            connection.close()
    raise DownloadError(f"{_shown(url)} leads from one address to the next, more than {_REDIRECTS} times.")


def _next(place: Place, url: str, location: str, limits: Limits) -> Place:
    try:
        return check_url(urljoin(f"{place.origin}{place.path}", location), loopback=limits.loopback)
    except InputError as error:
        raise DownloadError(f"{_shown(url)} leads to another address, which is refused: {error}") from None


def _ask(
    connection: http.client.HTTPConnection, sock: socket.socket, place: Place, limits: Limits,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:  # fmt: skip
    sent = {"User-Agent": f"haori/{version('haori')}", "Accept-Encoding": "identity", **headers}
    if (token := limits.tokens.get(place.origin)) is not None:
        sent["Authorization"] = f"Bearer {token}"
    try:
        # A byte now and then resets every timeout of a socket, so the head as a whole has one.
        with _deadline(sock, limits.headers_s):
            connection.request("GET", place.path, headers=sent)
            return connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        reason = str(error).strip() or type(error).__name__
        raise DownloadError(f"{place.host!r} gave no usable reply within {limits.headers_s:g} s: {reason}.") from error


@contextmanager
def _deadline(sock: socket.socket, seconds: float) -> Iterator[None]:
    def end() -> None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_status(reply: Reply, limits: Limits, *, asked_range: bool) -> None:
    status, host = reply.status, reply.place.host
    if status in {200, 206} or (status == 416 and asked_range):
        return
    said = reply.message(limits)
    remedy = {
        401: " It asks for a login: see `haori library add --help` for tokens.",
        403: " It does not allow this; it may ask for a login, or for its terms to be accepted on its page.",
        404: " Check the address.",
        429: " It is asked too often; try again later.",
        503: " It is overloaded; try again later.",
    }.get(status, "")
    raise DownloadError(f"{host!r} answered {status}{f' ({said})' if said else ''} instead of the file.{remedy}")


def _shown(url: str) -> str:
    return repr(url.partition("?")[0][:200])
