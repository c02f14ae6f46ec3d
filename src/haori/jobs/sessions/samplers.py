"""Sampling sessions: what a client samples from, by an id of its own.

One made from a run's weights of the moment lives in the engine's memory with no file; of these a run keeps the latest
few. One made from a checkpoint is made again when it is needed, after a restart too.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, select

from haori.jobs.database.connection import Database
from haori.jobs.database.tables import sampling_sessions
from haori.jobs.missing import MissingError
from haori.jobs.sessions.gone import GoneError
from haori.serve.request import AdapterMix

if TYPE_CHECKING:
    from haori.jobs.tenants.pool import TrainingPool

__all__ = ["LIVE", "Sampler", "Samplers", "load_for_sampling", "sampler_id"]

LIVE = "live:"
_KEPT_OF_A_RUN = 8


@dataclass(frozen=True)
class Sampler:
    """One sampling session.

    Attributes:
        mix: The adapters that act, once they can.
        path: What it was made from; None for the base, `live:<run>` for the weights of a moment.
    """

    id: str
    session: str
    owner: str
    mix: "Future[AdapterMix]"
    path: str | None


def sampler_id(session: str, number: int) -> str:
    """Return the id of a session's sampler."""
    return f"{session}:sample:{number}"


class Samplers:
    """All of them; every method may be called from any thread.

    Args:
        database: Holds a row for each.
        base: Name of the base.
        engine: Returns what takes adapters while it serves: `put_adapter(id, weights)` and `drop_adapter(id)`.
    """

    def __init__(self, database: Database, base: str, engine: Callable[[], Any]) -> None:
        self._database = database
        self._base = base
        self._engine = engine
        self._lock = threading.Lock()
        self._known: dict[str, Sampler] = {}

    def add_live(self, identity: str, session: str, owner: str, run: str, weights: Any) -> None:
        """Make the weights of a moment a sampler; the oldest of the run's beyond a few go."""
        with self._lock:
            if identity in self._known:  # a run that was put away does again what it did
                return
        adapter = f"{LIVE}{identity}"
        self._engine().put_adapter(adapter, weights)
        self._put(Sampler(identity, session, owner, _done(((adapter, 1.0),)), f"{LIVE}{run}"))
        with self._lock:
            of_run = [one for one in self._known.values() if one.path == f"{LIVE}{run}"]
        for old in of_run[:-_KEPT_OF_A_RUN]:
            self.drop(old)

    def add(self, identity: str, session: str, owner: str, path: str | None, mix: "Future[AdapterMix]") -> None:
        """Make a sampler of the base, a checkpoint or a library adapter."""
        self._put(Sampler(identity, session, owner, mix, path))

    def holds(self, identity: str, owner: str, path: str | None) -> bool:
        """Say whether a sampler was made of a path and is in memory."""
        with self._lock:
            known = self._known.get(identity)
        if known is None or (known.owner, known.path) != (owner, path):
            return False
        return not known.mix.done() or known.mix.exception() is None

    def find(self, identity: str, owner: str, make: Callable[[str | None], "Future[AdapterMix]"]) -> Sampler:
        """Return a sampler of an account.

        Args:
            identity: Its id.
            owner: The account.
            make: Makes the adapters of a path ready again, after a restart.

        Raises:
            MissingError: There is none.
            GoneError: It was of the weights of a moment, and they are no longer kept.
        """
        with self._lock:
            known = self._known.get(identity)
        if known is not None and known.owner == owner:
            return known
        row = self._row(identity, owner)
        if row is None:
            raise MissingError(f"There is no sampling session {identity[:200]!r}; make one first.")
        if row.model_path is not None and row.model_path.startswith(LIVE):
            raise GoneError(
                f"The weights of the sampling session {identity!r} are no longer kept; save the run's weights for "
                "sampling again."
            )
        mix = make(row.model_path)
        made = Sampler(identity, row.session_id, owner, mix, row.model_path)
        with self._lock:
            return self._known.setdefault(identity, made)

    def made_from(self, identity: str, owner: str) -> str | None:
        """Return the path that an account's sampler was made from; None where there is no such sampler.

        One of the base, or of the weights of a moment, was made from no path.
        """
        row = self._row(identity, owner)
        path: str | None = None if row is None else row.model_path
        return None if path is None or path.startswith(LIVE) else path

    def of_session(self, session: str) -> list[str]:
        """Return the ids of a session's samplers."""
        chosen = select(sampling_sessions.c.id).where(sampling_sessions.c.session_id == session)
        with self._database.reading() as connection:
            return list(connection.execute(chosen.order_by(sampling_sessions.c.created)).scalars())

    def end_session(self, session: str) -> None:
        """Free the memory of a session's samplers."""
        with self._lock:
            left = [one for one in self._known.values() if one.session == session]
        for one in left:
            self.drop(one)

    def drop(self, sampler: Sampler) -> None:
        """Free the memory of a sampler."""
        with self._lock:
            self._known.pop(sampler.id, None)
        if sampler.mix.done() and sampler.mix.exception() is None:
            for adapter, _ in sampler.mix.result():
                if adapter.startswith(LIVE):
                    self._engine().drop_adapter(adapter)

    def _row(self, identity: str, owner: str) -> "Row[Any] | None":
        with self._database.reading() as connection:
            row = connection.execute(select(sampling_sessions).where(sampling_sessions.c.id == identity)).first()
        return row if row is not None and row.owner == owner else None

    def _put(self, sampler: Sampler) -> None:
        values = {
            "id": sampler.id, "session_id": sampler.session, "owner": sampler.owner, "base": self._base,
            "model_path": sampler.path, "created": time.time(),
        }  # fmt: skip
        with self._database.writing() as connection:
            self._database.insert_once(connection, sampling_sessions, values)
        with self._lock:
            self._known[sampler.id] = sampler


def load_for_sampling(pool: "TrainingPool", engine: Any, adapter: str, folder: Path) -> "Future[AdapterMix]":
    """Read an adapter's files and give its weights to the engine; the future gives the mix that uses them."""
    made: Future[AdapterMix] = Future()
    loaded = pool.load(adapter, folder, None, optimizer=False)
    weights = pool.weights(adapter)
    pool.drop(adapter)

    def put(done: "Future[Any]") -> None:
        error = loaded.exception() or done.exception()
        if error is not None:
            made.set_exception(error)
            return
        try:
            engine.put_adapter(adapter, done.result())
        except Exception as refused:  # noqa: BLE001 - whoever waits is told
            made.set_exception(refused)
        else:
            made.set_result(((adapter, 1.0),))

    weights.add_done_callback(put)
    return made


def _done(mix: AdapterMix) -> "Future[AdapterMix]":
    made: Future[AdapterMix] = Future()
    made.set_result(mix)
    return made
