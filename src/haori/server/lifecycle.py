"""The states of a server: loading, ready, draining, failed; and what its routes share."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from starlette.requests import Request

from haori.bases import Base
from haori.core.errors import HaoriError
from haori.jobs.sessions.service import TrainingService
from haori.server.access_log import AccessLog
from haori.server.answer_streams import StreamBridge
from haori.server.contracts import Backend
from haori.server.errors import ApiError
from haori.server.jobs_service import JobService
from haori.server.metrics import Meters
from haori.server.owned_models import OwnedDirectory
from haori.server.pictures.backend import PictureBackend
from haori.server.preparation import Preparation
from haori.server.quotas import Quotas
from haori.server.server_memory import ServerMemory
from haori.server.settings import PictureSettings, ServerSettings

__all__ = ["Service", "jobs_of", "service_of"]

State = Literal["loading", "ready", "draining", "failed"]

_LOADING_RETRY_S = 1.0
_TRAINING_PATHS = ("/api/v1/forward",)
_TRAINING_BYTES = 64 << 20
_PICTURE_PATHS = ("/sdapi/", "/v1/images/")


class Service:
    """What the routes of one server share.

    Attributes:
        base: The base that is, or will be, served; of two, the one for text.
        drawing: The base for pictures, if there is one; it may be the only one.
        picture_settings: Limits of what it draws.
        settings: Limits.
        log: Where requests and events are written.
        meters: Figures for `/metrics`.
        state: The server's state.
        failure: Why loading failed, if it did.
        streams: Carries stream chunks from the engine's thread to the event loop; set once the app runs.
        quotas: What each API key uses.
        memory: Gives memory back after answers that took much.
        preparation: The threads that render, tokenise, compile and submit.
        jobs: Files, jobs and webhooks; None unless it was started with jobs.
        training: Training sessions of remote clients; None unless it was started with jobs.
    """

    streams: StreamBridge

    def __init__(
        self, base: Base, settings: ServerSettings, log: AccessLog, *, drawing: Base | None = None,
        picture_settings: PictureSettings | None = None, jobs: JobService | None = None,
    ) -> None:  # fmt: skip
        self.base = base
        self.jobs = jobs
        self.training: TrainingService | None = None
        self.drawing = drawing
        self.picture_settings = picture_settings or PictureSettings()
        self.settings = settings
        self.log = log
        self.state: State = "loading"
        self.failure: HaoriError | None = None
        self.quotas = Quotas()
        self.memory = ServerMemory()
        self.preparation = Preparation(settings.max_preparing)
        self._backend: Backend | None = None
        self._pictures: PictureBackend | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.meters = Meters(
            base.name, lambda: self._backend, max_batch=settings.max_batch, metered_adapters=settings.metered_adapters
        )

    @property
    def has_text(self) -> bool:
        """Say whether there is a base for text."""
        return self.drawing is not self.base

    def max_body_bytes(self, path: str) -> int:
        """Return the size of the largest request that is read at an address."""
        if self.training is not None and path.startswith(_TRAINING_PATHS):
            return _TRAINING_BYTES
        if self.jobs is not None and (most := self.jobs.max_body_bytes(path)) is not None:
            return most
        drawn = self.drawing is not None and path.startswith(_PICTURE_PATHS)
        return self.picture_settings.max_body_bytes if drawn else self.settings.max_body_bytes

    @property
    def backend(self) -> Backend:
        """Return what answers requests for text.

        Raises:
            ApiError: It is loading, or the server is about to end (503).
        """
        self._check_state()
        if self._backend is None:
            raise self._loading(self.base)
        return self._backend

    @property
    def pictures(self) -> PictureBackend:
        """Return what draws.

        Raises:
            ApiError: It is loading, or the server is about to end (503).
        """
        self._check_state()
        if self._pictures is None:
            raise self._loading(self.drawing or self.base)
        return self._pictures

    def check_health(self) -> None:
        """Say why requests are not answered, if they are not.

        Raises:
            ApiError: The reason (503).
        """
        failure = self.backend.engine.failure if self.has_text else None
        if failure is not None:
            raise ApiError(503, failure, code="engine_unavailable")
        if self.drawing is not None:
            self.pictures  # noqa: B018 - raises while it is loaded

    def _check_state(self) -> None:
        if self.state == "draining":
            raise ApiError(
                503, "The server is about to end; ask another, or again later.", code="draining",
                retry_after_s=max(1.0, self.settings.drain_s),
            )  # fmt: skip
        if self.state == "failed":
            raise ApiError(503, f"The base could not be loaded: {self.failure}", code="loading_failed")

    def _loading(self, base: Base) -> ApiError:
        return ApiError(
            503, f"The base {base.name!r} is being loaded; ask again in a moment.", code="loading",
            retry_after_s=_LOADING_RETRY_S,
        )  # fmt: skip

    def attach(self, backend: Backend | None = None, pictures: PictureBackend | None = None) -> None:
        """Set what answers requests; from then on they are answered."""
        if backend is not None and self.jobs is not None:
            backend = replace(backend, directory=OwnedDirectory(backend.directory, self.jobs.names))
        with self._lock:
            self._backend, self._pictures = backend or self._backend, pictures or self._pictures
            whole = not (self.has_text and self._backend is None) and not (self.drawing and self._pictures is None)
            if self.state == "loading" and whole:
                self.state = "ready"

    def load(
        self,
        make: Callable[[], Backend] | None,
        on_failure: Callable[[], None],
        make_pictures: Callable[[], PictureBackend] | None = None,
    ) -> None:
        """Make what answers, on a thread of its own; calls `on_failure` if that fails."""

        def run() -> None:
            try:
                if make is not None:
                    self.attach(make())
                if make_pictures is not None:
                    self.attach(pictures=make_pictures())
            except Exception as error:  # noqa: BLE001 - whatever it was, the server must not wait for ever
                self.failure = error if isinstance(error, HaoriError) else HaoriError(f"Loading failed: {error!r}.")
                self.state = "failed"
                self.log.event(f"{self._named()} could not be loaded: {self.failure}")
                on_failure()
            else:
                self.log.event(f"Loaded: {self._named()[0].lower()}{self._named()[1:]}; requests are answered.")

        threading.Thread(target=run, name="haori-load", daemon=True).start()

    def _named(self) -> str:
        names = (
            [self.base.name]
            if self.drawing is None or self.drawing is self.base
            else [self.base.name, self.drawing.name]
        )
        return f"The base {names[0]!r}" if len(names) == 1 else f"The bases {names[0]!r} and {names[1]!r}"

    def drain(self) -> bool:
        """Refuse new requests and wait for those that run, at most `settings.drain_s`; say whether all have ended."""
        with self._lock:
            self.state = "draining"
            backend, pictures = self._backend, self._pictures
        # Requests in preparation are submitted before the engine drains.
        self.preparation.drain()
        end = time.monotonic() + self.settings.drain_s
        ended = backend is None or backend.engine.drain(self.settings.drain_s)
        return (pictures is None or pictures.drain(max(0.0, end - time.monotonic()))) and ended

    def close(self) -> None:
        """Cancel what runs and free everything; a second call does nothing."""
        with self._lock:
            backend, pictures, closed = self._backend, self._pictures, self._closed
            self._closed = True
        if closed:
            return
        if pictures is not None:
            pictures.close()
        if self.training is not None:
            self.training.close()
        if backend is not None:
            backend.engine.close()
        self.preparation.close()
        if self.jobs is not None:
            self.jobs.close()

    def open_streams(self) -> None:
        """Prepare to carry stream chunks to the running event loop."""
        self.streams = StreamBridge(asyncio.get_running_loop())


def service_of(request: Request) -> Service:
    """Return what the routes share."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def jobs_of(request: Request) -> JobService:
    """Return the files, jobs and webhooks of a server that has them."""
    jobs = service_of(request).jobs
    assert jobs is not None  # its routes are there only then
    return jobs
