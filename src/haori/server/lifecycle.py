"""The states of a server: loading, ready, draining, failed; and what its routes share."""

import asyncio
import threading
from collections.abc import Callable
from typing import Literal

from starlette.requests import Request

from haori.bases import Base
from haori.core.errors import HaoriError
from haori.server.access_log import AccessLog
from haori.server.answer_streams import StreamBridge
from haori.server.contracts import Backend
from haori.server.errors import ApiError
from haori.server.metrics import Meters
from haori.server.preparation import Preparation
from haori.server.quotas import Quotas
from haori.server.server_memory import ServerMemory
from haori.server.settings import ServerSettings

__all__ = ["Service", "service_of"]

State = Literal["loading", "ready", "draining", "failed"]

_LOADING_RETRY_S = 1.0


class Service:
    """What the routes of one server share.

    Attributes:
        base: The base that is, or will be, served.
        settings: Limits.
        log: Where requests and events are written.
        meters: Figures for `/metrics`.
        state: The server's state.
        failure: Why loading failed, if it did.
        streams: Carries stream chunks from the engine's thread to the event loop; set once the app runs.
        quotas: What each API key uses.
        memory: Gives memory back after answers that took much.
        preparation: The threads that render, tokenise, compile and submit.
    """

    streams: StreamBridge

    def __init__(self, base: Base, settings: ServerSettings, log: AccessLog) -> None:
        self.base = base
        self.settings = settings
        self.log = log
        self.state: State = "loading"
        self.failure: HaoriError | None = None
        self.quotas = Quotas()
        self.memory = ServerMemory()
        self.preparation = Preparation(settings.max_preparing)
        self._backend: Backend | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.meters = Meters(
            base.name, lambda: self._backend, max_batch=settings.max_batch, metered_adapters=settings.metered_adapters
        )

    @property
    def backend(self) -> Backend:
        """Return what answers requests.

        Raises:
            ApiError: It is loading, or the server is about to end (503).
        """
        if self.state == "draining":
            raise ApiError(
                503, "The server is about to end; ask another, or again later.", code="draining",
                retry_after_s=max(1.0, self.settings.drain_s),
            )  # fmt: skip
        if self.state == "failed":
            raise ApiError(503, f"The base could not be loaded: {self.failure}", code="loading_failed")
        if self._backend is None:
            raise ApiError(
                503, f"The base {self.base.name!r} is being loaded; ask again in a moment.", code="loading",
                retry_after_s=_LOADING_RETRY_S,
            )  # fmt: skip
        return self._backend

    def attach(self, backend: Backend) -> None:
        """Set what answers requests; from then on they are answered."""
        with self._lock:
            self._backend = backend
            if self.state == "loading":
                self.state = "ready"

    def load(self, make: Callable[[], Backend], on_failure: Callable[[], None]) -> None:
        """Make the backend on a thread of its own; calls `on_failure` if that fails."""

        def run() -> None:
            try:
                self.attach(make())
            except Exception as error:  # noqa: BLE001 - whatever it was, the server must not wait for ever
                self.failure = error if isinstance(error, HaoriError) else HaoriError(f"Loading failed: {error!r}.")
                self.state = "failed"
                self.log.event(f"The base {self.base.name!r} could not be loaded: {self.failure}")
                on_failure()
            else:
                self.log.event(f"The base {self.base.name!r} is loaded; requests are answered.")

        threading.Thread(target=run, name="haori-load", daemon=True).start()

    def drain(self) -> bool:
        """Refuse new requests and wait for those that run, at most `settings.drain_s`; say whether all have ended."""
        with self._lock:
            self.state = "draining"
            backend = self._backend
        # Requests in preparation are submitted before the engine drains.
        self.preparation.drain()
        return backend is None or backend.engine.drain(self.settings.drain_s)

    def close(self) -> None:
        """Cancel what runs and free everything; a second call does nothing."""
        with self._lock:
            backend, closed, self._closed = self._backend, self._closed, True
        if closed:
            return
        if backend is not None:
            backend.engine.close()
        self.preparation.close()

    def open_streams(self) -> None:
        """Prepare to carry stream chunks to the running event loop."""
        self.streams = StreamBridge(asyncio.get_running_loop())


def service_of(request: Request) -> Service:
    """Return what the routes share."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
