"""`haori serve --jobs`: files, fine-tuning jobs and webhooks, and the worker that does the jobs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.server.jobs_service import JobService
    from haori.server.lifecycle import Service

__all__ = ["Jobs", "TrainShare", "open_training_api", "running_jobs"]

Jobs = Annotated[
    bool,
    typer.Option(
        "--jobs", help="Also take files, fine-tuning jobs and training sessions, with a worker beside the server."
    ),
]
TrainShare = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="With --jobs: most of the time that training takes while it answers.")
]


@contextmanager
def running_jobs(base: "Base", *, wanted: bool) -> "Iterator[JobService | None]":
    """Yield what serves files and jobs, with a worker that ends with the block; None unless it is wanted."""
    if not wanted:
        yield None
        return
    from haori.jobs.database.connection import open_database
    from haori.jobs.queue.worker import start_worker_process
    from haori.server.jobs_service import open_job_service

    jobs = open_job_service(open_database(), base)
    try:
        worker = start_worker_process()
    except BaseException:
        jobs.close()
        raise
    try:
        yield jobs
    finally:
        worker.stop()
        jobs.close()


def open_training_api(service: "Service", share: float, *, on_engine: bool) -> None:
    """Let a server with jobs take training sessions too, if its own engine serves a base that writes text.

    Args:
        service: The server's.
        share: Most of the time that training takes while requests are answered.
        on_engine: Whether the engine of this process answers, and not vLLM or replicas.
    """
    from haori.serve import is_encoder
    from haori.server.tinker.opening import open_training

    if service.jobs is not None and on_engine and service.has_text and not is_encoder(service.base):
        service.training = open_training(service, service.jobs.database, share)
