"""Opens the training service of a server: over the base that it serves, with the engine that it serves by."""

from typing import TYPE_CHECKING

from haori.core.settings import settings
from haori.jobs.database.connection import Database
from haori.jobs.sessions.service import TrainingService

if TYPE_CHECKING:
    from haori.jobs.tenants.pool import TrainingPool
    from haori.server.lifecycle import Service

__all__ = ["open_training"]


def open_training(service: "Service", database: Database, share: float = 1.0) -> TrainingService:
    """Return the training service over a server's base; what trains is loaded when the first model is created.

    Args:
        service: The server's, whose engine samples; it may still be loading.
        database: Holds sessions, runs and checkpoints.
        share: Most of the time that training takes while requests are answered, samples for training among them.
    """

    def is_serving() -> bool:
        status = service.backend.engine.status()
        return status.running + status.waiting > 0

    def open_pool() -> "TrainingPool":
        from haori.jobs.tenants.pool import TrainingPool

        return TrainingPool(service.base, train_share=share, is_serving=is_serving)

    folder = settings().jobs / "sessions"
    aliases = settings().model_aliases
    return TrainingService(database, service.base, folder, open_pool, lambda: service.backend.engine, aliases)
