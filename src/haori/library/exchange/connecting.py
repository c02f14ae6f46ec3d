"""Connections to strangers: the address that a name resolves to is checked, and that very address is connected to.

A server that is told to fetch a URL must not be led into its own network (server-side request forgery): not by an
address in the URL, not by a redirect, not by a name that resolves to a private address, not by one that resolves
differently the second time (DNS rebinding: there is no second time). Proxies of the environment are not used.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from haori.core.errors import DownloadError, InputError

__all__ = ["Place", "check_url", "connect", "is_public"]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LONGEST_URL = 4096

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


class Place(NamedTuple):
    """A checked URL, in the parts that a request needs."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Return scheme, host and port: what a token belongs to."""
        return f"{self.scheme}://{self.host}:{self.port}"


def check_url(url: str, *, loopback: bool = False) -> Place:
    """Return the parts of a URL that may be fetched.

    Args:
        url: The URL.
        loopback: This machine itself may be asked, also over plain http.

    Raises:
        InputError: It is not https, names a user or password, or is malformed.
    """
    shown = url[:200]
    if len(url) > _LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"The URL {shown!r} is malformed: it is too long, or holds what must be written as %XX.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"The URL {shown!r} is malformed.") from None
    if not host or parts.username is not None or parts.password is not None:
        raise InputError(f"The URL {_without_user(shown)!r} must name a host, and no user or password.")
    if parts.scheme != "https" and not (loopback and parts.scheme == "http"):
        raise InputError(f"The URL {shown!r} is not https; nothing is fetched over an unprotected connection.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def is_public(address: Ip) -> bool:
    """Say whether an address is one of the public internet, with whatever address of IPv4 lies in it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = (address.ipv4_mapped, address.sixtofour, *(address.teredo or ()))
        if any(other is not None and not is_public(other) for other in inner):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def connect(place: Place, *, timeout_s: float, loopback: bool = False) -> http.client.HTTPConnection:
    """Return a connection to the host of a checked URL.

    Raises:
        DownloadError: The name is not known, leads to an address that is not public, or nothing answers there.
    """
    addresses = _resolve(place)
    for address in addresses:
        if not (is_public(address) or (loopback and address.is_loopback)):
            raise DownloadError(
                f"{place.host!r} is at {address}, which is not an address of the public internet; nothing is fetched "
                "from inside a network."
            )
    if place.scheme == "http" and not all(address.is_loopback for address in addresses):
        raise DownloadError(f"{place.host!r} was to be asked over http, which only this machine itself may be.")
    failure: OSError | None = None
    for address in addresses:
        connection = _Connection(place, str(address), timeout_s)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    reason = getattr(failure, "verify_message", None) or getattr(failure, "strerror", None) or failure
    raise DownloadError(f"{place.host!r} cannot be reached: {reason}.") from failure


def _resolve(place: Place) -> Sequence[Ip]:
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        return tuple(dict.fromkeys(ipaddress.ip_address(str(item[4][0]).partition("%")[0]) for item in found))
    except (OSError, ValueError, UnicodeError) as error:
        raise DownloadError(f"There is no host {place.host[:200]!r}, or the network is down.") from error


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to one address, under the name of the host (for TLS, too)."""

    def __init__(self, place: Place, address: str, timeout_s: float) -> None:
        super().__init__(place.host, place.port, timeout=timeout_s)
        self._place, self._address = place, address
        self.default_port = 443 if place.scheme == "https" else 80  # of the Host header

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self._place.port), self.timeout)
        if self._place.scheme != "https":
            self.sock = plain
            return
        try:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self._place.host)
        except BaseException:
            plain.close()
            raise


def _without_user(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}...@{rest.rpartition('@')[2]}" if "@" in rest else url
