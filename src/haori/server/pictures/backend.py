"""All that draws pictures in one server: a generator, the queue before it, what can be named, limits."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from haori.bases import Base
from haori.images.catalogue import Catalogue
from haori.images.generation import PictureGenerator
from haori.images.queue import PictureQueue
from haori.server.pictures.meters import PictureMeters
from haori.server.preparation import Preparation
from haori.server.settings import PictureSettings

__all__ = ["PictureBackend"]


@dataclass
class PictureBackend:
    """What draws, once it is loaded.

    Attributes:
        generator: Draws; its `check` refuses what cannot be drawn.
        queue: The jobs before it.
        catalogue: The adapters that prompts may name.
        settings: Limits.
        preparation: The thread that reads requests and adapters.
        meters: Figures of what is drawn.
        created_unix_s: When the server had loaded it, in seconds since 1970.
    """

    generator: PictureGenerator
    queue: PictureQueue
    catalogue: Catalogue
    settings: PictureSettings
    preparation: Preparation
    meters: PictureMeters
    created_unix_s: int
    _idle: threading.Condition = field(default_factory=threading.Condition)
    _under_way: int = 0

    @property
    def base(self) -> Base:
        """Return the base that draws."""
        return self.generator.base

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as under way."""
        with self._idle:
            self._under_way += 1
        try:
            yield
        finally:
            with self._idle:
                self._under_way -= 1
                self._idle.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until every request has its reply; False if some have not after `timeout_s`."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._under_way, timeout_s)

    def close(self) -> None:
        """Cancel what runs and waits."""
        self.queue.close()
        self.preparation.close()
