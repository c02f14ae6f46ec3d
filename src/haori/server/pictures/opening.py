"""Loads what draws; runs beside the server, which says meanwhile that it is loading."""

import time

from haori.images.catalogue import Catalogue
from haori.images.generation import PictureGenerator
from haori.images.queue import PictureQueue
from haori.server.errors import without_folders
from haori.server.lifecycle import Service
from haori.server.pictures.backend import PictureBackend
from haori.server.pictures.meters import PictureMeters
from haori.server.preparation import Preparation

__all__ = ["attach_generator", "open_pictures"]


def open_pictures(service: Service, batch: int, dtype: str | None = None) -> PictureBackend:
    """Load the base that draws, and look through the mounted folders.

    Args:
        service: Of the server; it has such a base.
        batch: Pictures of one request that are drawn at once.
        dtype: Format to compute in; None for what suits the machine.

    Raises:
        HaoriError: The base cannot be loaded.
    """
    assert service.drawing is not None
    backend = attach_generator(service, PictureGenerator(service.drawing, batch=batch, dtype=dtype))
    for scan in backend.catalogue.refresh():
        for problem in scan.problems:
            service.log.event(without_folders(problem))
    return backend


def attach_generator(service: Service, generator: PictureGenerator) -> PictureBackend:
    """Return what draws with a generator, for `Service.attach`."""
    settings = service.picture_settings
    queue = PictureQueue(generator, waiting=settings.max_queue, say=service.log.event)
    registry, metered = service.meters.registry, service.settings.metered_adapters
    return PictureBackend(
        generator,
        queue,
        Catalogue(generator.adapters, generator.family.name),
        settings,
        Preparation(settings.max_queue),
        PictureMeters(generator.base.name, registry, queue.status, metered_adapters=metered),
        int(time.time()),
    )
