"""Opens the database: the right settings for each kind, and every migration applied.

SQLite is used in WAL mode, which needs shared memory: on a network file system it loses writes, so that is refused.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from haori.core.errors import InputError, StorageError
from haori.core.lock import file_lock
from haori.core.settings import settings
from haori.core.storage import make_folder

__all__ = ["Database", "DatabaseError", "in_full", "open_database"]

_BUSY_S = 30
_UNFIT = "A text that was given cannot be kept: it is too long, or has characters that are no text, such as NUL."
_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "lustre",
    "glusterfs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "9p",
    "afs",
    "gpfs",
    "beegfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
}
_POSTGRES_LOCK = 0x48616F7269  # "Haori"


class DatabaseError(StorageError):
    """The database cannot be read or written.

    Its sentence may be shown to clients: of a database server it tells neither address nor what that said.

    Attributes:
        detail: Address and reason, for whoever runs the server; empty where the sentence says all.
        away: Whether the database does not answer at all, for now.
    """

    def __init__(self, sentence: str, detail: str = "", *, away: bool = False) -> None:
        super().__init__(sentence)
        self.detail, self.away = detail, away


def in_full(error: BaseException) -> str:
    """Return an error as logs have it: of a database, with its address (without a password) and its reason."""
    detail = error.detail if isinstance(error, DatabaseError) else ""
    return f"{error} ({detail})" if detail else str(error)


class Database:
    """An open database; every method may be called from any thread.

    Attributes:
        engine: For reading, and for writing on PostgreSQL.
        is_sqlite: Whether it is SQLite.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.engine = create_engine(url, connect_args={"timeout": _BUSY_S}, json_serializer=_json)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(
                url, pool_size=16, max_overflow=16, pool_timeout=60, pool_pre_ping=True, json_serializer=_json
            )

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that may write; it is committed at the end.

        Raises:
            InputError: A value is none that the database takes, such as text with NUL.
            DatabaseError: The database cannot be written.
        """
        try:
            with self.engine.connect().execution_options(haori_writes=True) as connection, connection.begin():
                yield connection
        except (DataError, UnicodeEncodeError) as error:
            raise InputError(_UNFIT) from error
        except (DBAPIError, PoolTimeoutError) as error:
            raise self._problem(error, "written") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the database.

        Raises:
            InputError: A value is none that the database takes, such as text with NUL.
            DatabaseError: The database cannot be read.
        """
        try:
            with self.engine.connect() as connection, connection.begin():
                yield connection
        except (DataError, UnicodeEncodeError) as error:
            raise InputError(_UNFIT) from error
        except (DBAPIError, PoolTimeoutError) as error:
            raise self._problem(error, "read") from error

    def insert_once(self, connection: Connection, table: Table, values: Mapping[str, Any]) -> bool:
        """Insert a row unless there is one of its id, also one that another connection inserts at this moment.

        Args:
            connection: As `writing` yields it.
            table: Whose primary key is `id`.
            values: Of the row.

        Returns:
            Whether it was inserted.
        """
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        put = insert(table).values(values).on_conflict_do_nothing(index_elements=["id"])
        return bool(connection.execute(put).rowcount)

    def _problem(self, error: SQLAlchemyError, what: str) -> DatabaseError:
        if self.is_sqlite:
            return DatabaseError(f"The database {self.named()} cannot be {what}: {_reason(error)}.")
        away = isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)
        why = "it does not answer; try again in a moment" if away else "it refuses what was asked of it"
        return DatabaseError(f"The database cannot be {what}: {why}.", f"{self.named()}: {_reason(error)}", away=away)

    def named(self) -> str:
        """Return its address, without a password."""
        return repr(self.url.database if self.is_sqlite else self.url.render_as_string(hide_password=True))

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_database(url: str | None = None) -> Database:
    """Open the database and bring it to this version.

    Args:
        url: Such as `postgresql://user@host/name` or `sqlite:////folder/haori.db`; None for HAORI_DATABASE, or else
            `haori.db` in the workspace.

    Raises:
        InputError: It is no such address, or SQLite on a network file system.
        StorageError: It cannot be opened, or was written by a newer version.
    """
    database = Database(_url(url or settings().database))
    try:
        if database.is_sqlite:
            path = Path(str(database.url.database))
            make_folder(path.parent)
            _check_local(path)
            with file_lock(path.with_name(f".{path.name}.lock"), holds="database"):
                _migrate(database)
        else:
            _migrate(database)
    except SQLAlchemyError as error:
        database.close()
        raise DatabaseError(f"The database {database.named()} cannot be opened: {_reason(error)}.") from error
    except BaseException:
        database.close()
        raise
    return database


def _json(value: Any) -> str:
    """Return a value as JSON, which knows no infinity and no NaN (RFC 8259): such figures are null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _url(given: str | None) -> URL:
    if given is None:
        return URL.create("sqlite", database=str(settings().database_file))
    try:
        url = make_url(given)
    except ArgumentError:
        url = None
    backend = "" if url is None else url.get_backend_name()
    if url is None or backend not in ("sqlite", "postgresql") or not url.database or url.database == ":memory:":
        raise InputError(
            f"The database cannot be {given.partition('@')[2] or given!r}; give postgresql://user@host/name, or "
            "sqlite:////folder/haori.db, or leave HAORI_DATABASE out for a file in the workspace."
        )
    if backend == "postgresql":
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise InputError("PostgreSQL needs psycopg: pip install 'haori[postgres]'.") from None
        return url.set(drivername="postgresql+psycopg")
    return url


def _migrate(database: Database) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with database.writing() as connection:
        if not database.is_sqlite:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")
        held = MigrationContext.configure(connection).get_current_revision()
        if held == scripts.get_current_head():
            return
        if held is not None and held not in {script.revision for script in scripts.walk_revisions()}:
            raise StorageError(
                f"The database {database.named()} was written by a newer version of Haori (its version is {held}); "
                "update this one."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _prepare_sqlite(connection: object, _: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # transactions begin where we say
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for line in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={_BUSY_S * 1000}", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {line}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("haori_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _check_local(path: Path) -> None:
    kind = _file_system(path.parent)
    if kind in _NETWORK:
        raise InputError(
            f"{str(path)!r} is on a network file system ({kind}), where SQLite loses writes; put it on a local disk "
            "(HAORI_DATABASE=sqlite:////folder/haori.db), or give HAORI_DATABASE=postgresql://user@host/name."
        )


def _file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the kind of file system that a folder is on, "" where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, best, kind = str(folder.resolve()), -1, ""
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:  # the last of equal ones lies on top
            best, kind = len(mount), fields[2]
    return kind


def _reason(error: SQLAlchemyError) -> str:
    text = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
