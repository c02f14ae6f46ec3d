"""The clock of leases, which nobody sets: all who share a database must agree on it.

SQLite is used on one machine alone, whose monotonic clock counts from its start for every process and does not run
while it sleeps. With PostgreSQL it is the server's clock. Times that people see are time.time() instead.
"""

import time

from sqlalchemy import ColumnElement, Float, bindparam, cast, func, or_

from haori.jobs.database.connection import Database

__all__ = ["LONGEST_LEASE_S", "lease_now", "ran_out"]

LONGEST_LEASE_S = 3600.0


def lease_now(database: Database) -> ColumnElement[float]:
    """Return the present time on the clock of leases, as a statement uses it."""
    if database.is_sqlite:
        return bindparam(None, callable_=time.monotonic, type_=Float)  # asked when it is executed
    return cast(func.extract("epoch", func.clock_timestamp()), Float)


def ran_out(database: Database, until: ColumnElement[float | None]) -> ColumnElement[bool]:
    """Say of a lease whether it is over; one that ends too far ahead is from before the machine was started anew."""
    now = lease_now(database)
    return or_(until < now, until > now + LONGEST_LEASE_S)
