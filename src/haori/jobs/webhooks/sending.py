"""One delivery: signed by the Standard Webhooks scheme, and sent to an allowed public address and nowhere else.

signature = base64(HMAC-SHA256(secret, "<id>.<time>.<body>"))    https://www.standardwebhooks.com

The name in the URL is resolved once, the address is checked and that very address is connected to; a redirect is not
followed, so no reply can lead the server elsewhere.
"""

import base64
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from http.client import HTTPException
from typing import Any

from haori.core.errors import DownloadError, InputError
from haori.core.settings import settings
from haori.library.exchange.connecting import check_url, connect

__all__ = ["check_target", "new_secret", "send", "signature"]

_PREFIX = "whsec_"
_LONGEST_S = 15.0


def new_secret() -> str:
    """Return a secret of 192 random bits."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def signature(secret: str, identity: str, at: int, body: bytes) -> str:
    """Return the signature of a delivery, `v1,` before it.

    Args:
        secret: `whsec_` and base64.
        identity: Of the event; the same for each attempt.
        at: Seconds since 1970.
        body: As it is sent.
    """
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    digest = hmac.new(key, f"{identity}.{at}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def check_target(url: str) -> None:
    """Refuse a URL that nothing is sent to.

    Raises:
        InputError: It is not https, or its host is none that the server's owner allowed.
    """
    try:
        place = check_url(url, loopback=settings().webhook_to_loopback)
    except InputError as error:
        raise InputError(f"'url' cannot be used: {error}") from None
    allowed = settings().webhook_hosts
    if not any(fnmatchcase(place.host, pattern.lower()) for pattern in allowed):
        listed = ", ".join(allowed) or "none"
        raise InputError(
            f"'url' cannot have the host {place.host[:120]!r}; allowed by this server: {listed}. Its owner allows "
            'hosts with HAORI_WEBHOOK_HOSTS=["hooks.example.org"].'
        )


def send(url: str, signing: Sequence[str], identity: str, event: Mapping[str, Any]) -> int:
    """Send an event; return the status of the reply.

    Args:
        url: Where to.
        signing: Secrets; while one is being replaced, both.
        identity: Of the event.
        event: What is told.

    Raises:
        DownloadError: Nothing answers there in time, or the address is not a public one.
        InputError: The URL is none that is allowed.
    """
    check_target(url)
    loopback = settings().webhook_to_loopback
    place = check_url(url, loopback=loopback)
    body = json.dumps(event, separators=(",", ":")).encode()
    at = int(time.time())
    headers = {
        "content-type": "application/json", "user-agent": "Haori", "webhook-id": identity,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(signature(secret, identity, at, body) for secret in signing),
    }  # fmt: skip
    connection = connect(place, timeout_s=_LONGEST_S, loopback=loopback)

    def give_up() -> None:
        with suppress(OSError):
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(_LONGEST_S, give_up)  # a reply that comes byte by byte keeps within each wait
    watch.daemon = True
    watch.start()
    try:
        connection.request("POST", place.path, body=body, headers=headers)
        return connection.getresponse().status
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(f"{place.host!r} did not answer in {_LONGEST_S:g} s: {reason[:200]}.") from error
    finally:
        watch.cancel()
        connection.close()
