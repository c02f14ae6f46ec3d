"""Runs an app on an address until a signal or a caller ends it.

The address is bound before anything is loaded, so that one in use is reported at once. The first SIGTERM or SIGINT
refuses new requests (503) and lets running ones finish; a second one ends the process at once.
"""

import asyncio
import os
import socket
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from haori.core.errors import InputError
from haori.server.lifecycle import Service

__all__ = ["RunningServer", "listen"]

_BACKLOG = 2048
_GRACE_S = 5
_KEEP_ALIVE_S = 75


def listen(host: str, port: int) -> socket.socket:
    """Take an address; port 0 takes a free one.

    Raises:
        InputError: The host is unknown, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise InputError(f"There is no host {host!r} on this machine; 127.0.0.1 is the usual one.") from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(_BACKLOG)  # only now is an address that another process listens on refused
    except OSError as error:
        taken.close()
        raise InputError(
            f"{host}:{port} cannot be used: {error.strerror}; choose another --port, or end the process that has it."
        ) from None
    return taken


class RunningServer(uvicorn.Server):
    """uvicorn that drains before it stops listening."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, log_level="error", access_log=False, server_header=False, backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=_GRACE_S, ws="none",
            )
        )  # fmt: skip
        self._service = service
        self._ending = False

    def serve_on(self, taken: socket.socket) -> None:
        """Answer until told to end, then free everything.

        Raises:
            HaoriError: The base could not be loaded.
        """
        try:
            asyncio.run(self.serve([taken]))
        finally:
            self._service.close()
        if self._service.failure is not None:
            raise self._service.failure

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second."""
        if self._ending:
            sys.stderr.flush()
            os._exit(128 + sig)
        self.end()

    def end(self) -> None:
        """Refuse new requests, wait for those that run, and stop."""
        self._ending = True
        threading.Thread(target=self._drain, name="haori-drain", daemon=True).start()

    def stop(self) -> None:
        """Stop without waiting."""
        self.should_exit = True

    def _drain(self) -> None:
        service = self._service
        service.log.event(
            f"New requests are refused; those that run have {service.settings.drain_s:g} s. "
            "A second signal ends them at once."
        )
        if not service.drain():
            service.log.event("Some requests did not end in time; they are cancelled.")
            service.close()  # before the connections, so that clients get an error
        self.stop()
