"""What an account may have: unfinished jobs, rows of a job, tokens trained in 30 days, bytes of files.

Each check reads what the account has on the connection that then writes, so two requests at once cannot both take the
last of it.
"""

import time
from typing import NamedTuple

from sqlalchemy import Connection, Select, func, select

from haori.core.errors import InputError, OverloadedError
from haori.jobs.database.tables import files, jobs, uploads

__all__ = ["QuotaError", "Quotas"]

_UNFINISHED = ("queued", "running", "paused")
_WINDOW_S = 30 * 24 * 3600.0
_RETRY_S = 60.0


class QuotaError(OverloadedError):
    """An account has used what it may for now."""


class Quotas(NamedTuple):
    """The limits of one account; None for no limit.

    Attributes:
        jobs: Jobs that have not ended.
        rows: Training rows of one job.
        tokens: Tokens trained in 30 days, with those that unfinished jobs are to train.
        bytes: Bytes of its files, with those that are being uploaded.
    """

    jobs: int | None = None
    rows: int | None = None
    tokens: int | None = None
    bytes: int | None = None

    def check_job(self, connection: Connection, owner: str, *, rows: int, tokens: int) -> None:
        """Refuse a job that would be beyond the limits.

        Args:
            connection: In a transaction that writes (`Database.writing`).
            owner: The account.
            rows: Training rows of the job.
            tokens: Tokens that it is to train, all epochs together.

        Raises:
            InputError: It is larger than any job of the account may be.
            QuotaError: It has to wait, or the account has to end other jobs.
        """
        if self.rows is not None and rows > self.rows:
            raise InputError(
                f"The job has {rows:,} training rows; the account {owner!r} may train {self.rows:,} a job."
            )
        if self.tokens is not None and tokens > self.tokens:
            raise InputError(
                f"The job would train {tokens:,} tokens; the account {owner!r} may train {self.tokens:,} in 30 days."
            )
        mine = jobs.c.owner == owner
        unfinished = jobs.c.state.in_(_UNFINISHED)
        if self.jobs is not None:
            held = connection.execute(select(func.count()).where(mine, unfinished)).scalar_one()
            if held >= self.jobs:
                raise QuotaError(
                    f"The account {owner!r} has {held} unfinished jobs and may have {self.jobs}; wait, or cancel one.",
                    _RETRY_S,
                )
        if self.tokens is not None:
            recent = unfinished | (jobs.c.ended > time.time() - _WINDOW_S)
            used = _total(connection, select(func.sum(jobs.c.tokens)).where(mine, recent))
            if used + tokens > self.tokens:
                raise QuotaError(
                    f"The account {owner!r} has trained {used:,} of the {self.tokens:,} tokens that it may in 30 days, "
                    f"and the job would train {tokens:,}.",
                    _RETRY_S,
                )

    def check_bytes(self, connection: Connection, owner: str, size: int) -> None:
        """Refuse a file that would be beyond the limit.

        Args:
            connection: In a transaction that writes.
            owner: The account.
            size: Bytes of the file.

        Raises:
            InputError: It is larger than all files of the account may be.
            QuotaError: Files have to be deleted first.
        """
        if self.bytes is None:
            return
        if size > self.bytes:
            raise InputError(f"The file has {size:,} bytes; the account {owner!r} may keep {self.bytes:,}.")
        kept = _total(connection, select(func.sum(files.c.bytes)).where(files.c.owner == owner))
        coming = select(func.sum(uploads.c.bytes)).where(uploads.c.owner == owner, uploads.c.status == "pending")
        used = kept + _total(connection, coming)
        if used + size > self.bytes:
            raise QuotaError(
                f"The account {owner!r} keeps {used:,} bytes of files and may keep {self.bytes:,}; delete some.",
                _RETRY_S,
            )


def _total(connection: Connection, asked: Select[int]) -> int:
    return int(connection.execute(asked).scalar_one() or 0)
