"""What the routes for files, jobs and webhooks share; a server has it only when it was started with jobs."""

import re
from dataclasses import dataclass

from haori.bases import Base
from haori.jobs.database.connection import Database
from haori.jobs.files import FileStore
from haori.jobs.fine_tuning.service import FineTuning
from haori.jobs.model_names import ModelNames
from haori.jobs.queue.store import JobStore
from haori.jobs.uploads import MOST_PART_BYTES, UploadStore
from haori.jobs.webhooks.deliverer import Deliverer
from haori.jobs.webhooks.store import WebhookStore
from haori.server.access import SIGNED_CONTENT

__all__ = ["JobService", "open_job_service"]

_FORM_BYTES = 64 << 10  # around a file
_PARTS = re.compile(r"/v1/uploads/[^/]+/parts")


@dataclass(frozen=True)
class JobService:
    """Stores over one database.

    Attributes:
        max_file_bytes: Largest file that is taken.
    """

    database: Database
    files: FileStore
    uploads: UploadStore
    store: JobStore
    names: ModelNames
    fine_tuning: FineTuning
    webhooks: WebhookStore
    deliverer: Deliverer
    max_file_bytes: int = 512 << 20

    def max_body_bytes(self, path: str) -> int | None:
        """Return the size of the largest request at an address that takes files; None for any other."""
        if path == "/v1/files" or SIGNED_CONTENT.fullmatch(path):
            return self.max_file_bytes + _FORM_BYTES
        return MOST_PART_BYTES + _FORM_BYTES if _PARTS.fullmatch(path) else None

    def close(self) -> None:
        """Send no more webhooks, and close the database."""
        self.deliverer.close()
        self.database.close()


def open_job_service(database: Database, base: Base | None = None, *, max_file_bytes: int = 512 << 20) -> JobService:
    """Return the stores over a database, with what expired meanwhile cleared away.

    Args:
        database: The open database.
        base: The base that is served, which jobs may train by its name even if it is not registered.
        max_file_bytes: Largest file that is taken.
    """
    files = FileStore(database)
    uploads = UploadStore(files)
    files.sweep()
    uploads.sweep()
    store, names = JobStore(database), ModelNames(database)
    tuning = FineTuning(store, files, names, base)
    webhooks = WebhookStore(database)
    return JobService(database, files, uploads, store, names, tuning, webhooks, Deliverer(webhooks), max_file_bytes)
