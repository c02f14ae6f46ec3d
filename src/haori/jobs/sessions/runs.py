"""Training runs: their rows, and those that are in memory; one that was put away, or whose server ended, comes back."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, func, select, update

from haori.core.client_runs import FRESH, ClientRun
from haori.core.errors import HaoriError, InputError, OverloadedError
from haori.jobs.database.connection import Database, DatabaseError
from haori.jobs.database.tables import training_runs
from haori.jobs.missing import MissingError
from haori.jobs.sessions.checkpoints import CheckpointShelf
from haori.jobs.sessions.gone import GoneError
from haori.jobs.sessions.library_saves import LIBRARY_KEY, LibrarySaves
from haori.jobs.sessions.paths import CheckpointPath, check_name, folder_name
from haori.jobs.sessions.records import LoadCall, Promise, SaveCall
from haori.jobs.sessions.run import Run, pass_on
from haori.jobs.sessions.samplers import Samplers
from haori.jobs.sessions.sources import Source, Sources

if TYPE_CHECKING:
    from haori.jobs.tenants.pool import TrainingPool
    from haori.jobs.tenants.records import AdapterSpec

__all__ = ["Runs", "run_id"]

MOST_LIVE = 64  # runs in memory: at rank 16 of a small base, about 60 MB each
_RETRY_S = 10.0
_ANSWERS = {
    "training": "save_weights", "sampler": "save_weights_for_sampler", "external": "save_weights_external"
}  # fmt: skip


def run_id(session: str, number: int) -> str:
    """Return the id of a session's training run, which clients derive themselves too."""
    return f"{session}:train:{number}"


class Runs:
    """All training runs; every method may be called from any thread.

    Args:
        database: Holds their rows.
        root: Holds their journals and states.
        base: Name of the base.
        pool: Returns what trains.
        shelf: Takes checkpoints.
        samplers: Takes weights of the moment.
        sources: Finds what is loaded.
        library: Takes checkpoints of runs that ask for it.
    """

    def __init__(
        self, database: Database, root: Path, base: str, pool: "Callable[[], TrainingPool]", shelf: CheckpointShelf,
        samplers: Samplers, sources: Sources, library: LibrarySaves,
    ) -> None:  # fmt: skip
        self._database, self._root, self._base, self._pool = database, root, base, pool
        self._shelf, self._samplers, self._sources, self._library = shelf, samplers, sources, library
        self._finish = ThreadPoolExecutor(1, "haori-sessions")
        self._lock = threading.RLock()
        self._live: dict[str, Run] = {}
        self._begun: dict[str, Promise] = {}

    def create(
        self, session: str, number: int, owner: str, spec: "AdapterSpec", user_metadata: Mapping[str, Any] | None = None
    ) -> Promise:
        """Begin a run with a fresh adapter; the promise of the first time if it was begun before."""
        if spec.seed is None:  # kept, so that the run can be done again from its journal
            spec = spec.model_copy(update={"seed": secrets.randbits(31)})
        values = {"spec": spec.model_dump(), "user_metadata": user_metadata}
        return self._begin(session, number, owner, values)

    def create_from(
        self, session: str, number: int, owner: str, call: LoadCall, user_metadata: Mapping[str, Any] | None = None
    ) -> Promise:
        """Begin a run with the weights of a checkpoint or library adapter, in the version of this moment."""
        identity = run_id(session, number)
        if self.is_begun(identity, owner):  # with what the path meant then
            return self.begun(identity, owner)
        call = self.settled(call, owner)
        spec = {"path": call.path, "optimizer": call.optimizer, "adapter": call.adapter}
        return self._begin(session, number, owner, {"spec": spec, "user_metadata": user_metadata})

    def settled(self, call: LoadCall, owner: str) -> LoadCall:
        """Return a call with the exact version that its path means now, which it means from then on.

        Raises:
            HaoriError: There is no such thing for this account.
        """
        source = self._sources.find(call.path, owner)
        return replace(call, path=source.path, adapter=source.adapter)

    def is_begun(self, identity: str, owner: str) -> bool:
        """Say whether an account has begun a run."""
        with suppress(MissingError):
            return bool(self.row(identity, owner))
        return False

    def begun(self, identity: str, owner: str) -> Promise:
        """Return the promise that a run was begun with."""
        self.find(identity, owner)
        return self._begun[identity]

    def row(self, identity: str, owner: str) -> "Row[Any]":
        """Return the row of an account's run.

        Raises:
            MissingError: There is none.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(training_runs).where(training_runs.c.id == identity)).first()
        if row is None or row.owner != owner:
            raise MissingError(f"There is no training run {identity[:200]!r}; create a model first.")
        return row

    @staticmethod
    def spec(row: "Row[Any]") -> dict[str, Any]:
        """Return the adapter of a run as its row has it; of one that was loaded, once that is done."""
        spec: dict[str, Any] = row.spec
        return spec

    def list(
        self, owner: str, *, limit: int, offset: int, session: str | None = None
    ) -> "tuple[Sequence[Row[Any]], int]":
        """Return an account's runs, latest first, and how many there are."""
        mine = training_runs.c.owner == owner
        chosen = mine if session is None else mine & (training_runs.c.session_id == session)
        with self._database.reading() as connection:
            count = connection.execute(select(func.count()).select_from(training_runs).where(chosen)).scalar_one()
            order = (training_runs.c.created.desc(), training_runs.c.id)
            rows = connection.execute(select(training_runs).where(chosen).order_by(*order).limit(limit).offset(offset))
            return rows.all(), count

    def find(self, identity: str, owner: str) -> Run:
        """Return an account's run, begun again from what is saved if it is not in memory.

        Raises:
            MissingError: There is none.
            GoneError: What was saved of it cannot be used.
        """
        with self._lock:
            known = self._live.get(identity)
            if known is not None and known.owner == owner:
                return known
            row = self.row(identity, owner)
            return self._restore(row)

    def put_away(self, sessions: set[str]) -> None:
        """Free the memory of runs of sessions that are silent; a request for one brings it back."""
        with self._lock:
            for identity, run in list(self._live.items()):
                if identity.partition(":")[0] in sessions and not run.busy:
                    self._drop(identity)

    def close(self) -> None:
        """Take no more requests; what was promised is done after the next start."""
        with self._lock:
            for run in self._live.values():
                run.close()
        self._finish.shutdown()
        self._library.close()

    def _begin(self, session: str, number: int, owner: str, values: Mapping[str, Any]) -> Promise:
        with self._lock:
            self.add(session, number, owner, values)
            return self.begun(run_id(session, number), owner)

    def add(self, session: str, number: int, owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write the row of a run that is not in memory yet, unless there is one, and return the spec that it has.

        Raises:
            InputError: The number is none.
        """
        if number < 0:
            raise InputError(f"model_seq_id is {number}; the models of a session are numbered from 0.")
        identity = run_id(session, number)
        now = time.time()
        row = {"id": identity, "session_id": session, "owner": owner, "base": self._base, "created": now,
               "last_request": now, "applied_seq": 0, "state": "live", **values}  # fmt: skip
        with self._database.writing() as connection:
            self._database.insert_once(connection, training_runs, row)
        return self.spec(self.row(identity, owner))

    def _drop(self, identity: str) -> None:
        self._live.pop(identity).close()
        del self._begun[identity]
        self._pool().drop(identity)

    def _make_room(self) -> None:
        """Put the run away that was silent for longest, if as many are in memory as there may be.

        Raises:
            OverloadedError: All of them are at work.
        """
        if len(self._live) < MOST_LIVE:
            return
        idle = [identity for identity, run in self._live.items() if not run.busy]
        if not idle:
            raise OverloadedError(f"{len(self._live)} training runs are at work already; ask again later.", _RETRY_S)
        self._drop(min(idle, key=lambda identity: self._live[identity].last_request_s))

    def _restore(self, row: "Row[Any]") -> Run:
        """Bring a run into memory: from its saved state, or from its beginning, and on through its journal."""
        from haori.jobs.tenants.records import AdapterSpec

        self._make_room()
        pool = self._pool()
        folder = self._root / folder_name(row.id)
        state = None if row.state_folder is None else folder / row.state_folder
        given: dict[str, Any] = row.spec
        promise = Promise(f"{row.id}:0", row.owner, run=row.id)
        answer: dict[str, Any] = {"type": "create_model", "model_id": row.id}
        if "path" in given:
            answer = {"type": "load_weights", "path": given["path"]}
        if state is not None:
            started: Future[Any] = pool.load(row.id, state / "weights", None, optimizer=True)
        elif "path" in given:
            source = self._sources.find(given["path"], row.owner, given.get("adapter"))
            begun = _client_run(row, source)
            started = pool.load(row.id, source.folder, None, optimizer=bool(given["optimizer"]), run=begun)
        else:
            started = pool.create(row.id, AdapterSpec.model_validate(given), _client_run(row))

        def ready(found: Any) -> dict[str, Any]:
            if "path" in given and "rank" not in given:
                with self._database.writing() as connection:
                    changed = update(training_runs).where(training_runs.c.id == row.id)
                    connection.execute(changed.values(spec={**given, **found.model_dump()}))
            return answer

        pass_on(self._then(started, ready), promise.future)

        def saved(number: int, where: Path) -> None:
            changes = {"applied_seq": number, "state_folder": where.name, "last_request": time.time()}
            with self._database.writing() as connection:
                connection.execute(update(training_runs).where(training_runs.c.id == row.id).values(**changes))

        run = Run(
            row.id, row.owner, folder, pool, self._finish, save=self._save, load=self._load, saved=saved,
            library=((row.user_metadata or {}).get("given") or {}).get(LIBRARY_KEY), applied=row.applied_seq,
        )  # fmt: skip
        self._live[row.id], self._begun[row.id] = run, promise
        try:
            run.recover(state)
        except DatabaseError:
            del self._live[row.id], self._begun[row.id]
            raise
        except HaoriError as error:
            del self._live[row.id], self._begun[row.id]
            raise GoneError(f"The training run {row.id!r} cannot be brought back: {error}") from error
        return run

    def _save(self, run: Run, number: int, call: SaveCall) -> "Future[dict[str, Any]]":
        if call.sampler is not None:
            return self._save_live(run, call.sampler)
        path = CheckpointPath(run.id, call.kind, check_name(call.name or f"{number:06d}"))
        if not call.overwrite:
            self._shelf.check_free(path, number)
        files = self._pool().save(
            run.id, self._shelf.folder(path), optimizer=call.kind == "training", checkpoint=str(path), request=number
        )
        kind = _ANSWERS[call.kind]

        def write(_: Any) -> dict[str, Any]:
            self._shelf.add(path, run.owner, number, ttl_s=call.ttl_s, user_metadata=call.user_metadata)
            return {"type": kind, "path": str(path)}

        written = self._then(files, write)
        if run.library is None or call.kind != "sampler" or call.name is None:
            return written
        return self._into_library(run, path, number, written)

    def _into_library(
        self, run: Run, path: CheckpointPath, number: int, written: "Future[dict[str, Any]]"
    ) -> "Future[dict[str, Any]]":
        """Put a checkpoint that is written into the library, and say in its answer as what."""
        assert run.library is not None
        name, made = run.library, Future[dict[str, Any]]()

        def added(stored: str) -> dict[str, Any]:
            with suppress(MissingError):  # it was deleted meanwhile
                self._shelf.change(path, run.owner, library_name=stored)
            return {**written.result(), "library": stored}

        def begin(_: "Future[Any]") -> None:
            if written.exception() is not None:
                made.set_exception(written.exception())
                return
            pass_on(self._library.put(path, self._shelf.folder(path), number, name, added), made)

        written.add_done_callback(begin)
        return made

    def _save_live(self, run: Run, sampler: str) -> "Future[dict[str, Any]]":
        """Give the weights of this moment to the engine that serves."""
        session = run.id.partition(":")[0]

        def put(weights: Any) -> dict[str, Any]:
            self._samplers.add_live(sampler, session, run.owner, run.id, weights)
            return {"type": "save_weights_for_sampler", "sampling_session_id": sampler}

        return self._then(self._pool().weights(run.id), put)

    def _load(self, run: Run, call: LoadCall) -> "Future[dict[str, Any]]":
        source = self._sources.find(call.path, run.owner, call.adapter)
        begun = _client_run(self.row(run.id, run.owner), source)
        loaded = self._pool().load(run.id, source.folder, None, optimizer=call.optimizer, run=begun)
        return self._then(loaded, lambda _: {"type": "load_weights", "path": call.path})

    def _then(self, first: "Future[Any]", work: Callable[[Any], dict[str, Any]]) -> "Future[dict[str, Any]]":
        """Do the rest of an operation, which takes files or the database, off the pool's thread."""
        made: Future[dict[str, Any]] = Future()

        def rest() -> None:
            try:
                made.set_result(work(first.result()))
            except BaseException as error:  # noqa: BLE001 - whoever waits is told
                made.set_exception(error)

        first.add_done_callback(lambda _: self._finish.submit(rest))
        return made


def _client_run(row: "Row[Any]", source: Source | None = None) -> ClientRun:
    """Return what the checkpoints of a run say of it, as it begins."""
    return ClientRun(
        run=row.id, metadata=(row.user_metadata or {}).get("given"),
        started_from=FRESH if source is None else source.path, parent=None if source is None else source.adapter,
    )  # fmt: skip
