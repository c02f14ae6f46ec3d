"""The service behind the training API: who has which sessions, runs, samplers and promises. Free of HTTP."""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, nearest
from haori.core.storage import make_folder
from haori.jobs.database.connection import Database, in_full
from haori.jobs.model_names import ModelNames
from haori.jobs.sessions.checkpoints import CheckpointShelf
from haori.jobs.sessions.clients import Clients
from haori.jobs.sessions.gone import GoneError
from haori.jobs.sessions.library_saves import LibrarySaves
from haori.jobs.sessions.records import Promise, SampleCall
from haori.jobs.sessions.request_keys import RequestKeys, id_of_key
from haori.jobs.sessions.runs import Runs
from haori.jobs.sessions.samplers import LIVE, Samplers, load_for_sampling
from haori.jobs.sessions.sampling import Samples
from haori.jobs.sessions.sources import Sources
from haori.serve.request import BASE, AdapterMix

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.jobs.tenants.pool import TrainingPool

__all__ = ["TrainingService", "Turn"]

_SILENT_S = 900.0  # then a session's runs are put away; they come back when it speaks
_SWEEP_EVERY_S = 60.0
_KEEP_RETRIEVED_S = 120.0
_KEEP_S = 3600.0


@dataclass(frozen=True)
class Turn:
    """Whose a request is: the account that owns what it makes, and whose turn its samples take."""

    account: str
    owner: str = ""


class TrainingService:
    """All training sessions over one base.

    Args:
        database: Holds the rows.
        base: The base.
        folder: Holds journals, states and checkpoints.
        open_pool: Loads what trains; called when the first run begins.
        engine: Returns the engine that serves, which writes the samples.
        aliases: Other names of bases.
    """

    def __init__(
        self, database: Database, base: "Base", folder: Path, open_pool: "Callable[[], TrainingPool]",
        engine: Callable[[], Any], aliases: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.base = base
        self.names = (base.name, *(name for name, meant in aliases.items() if meant == base.name))
        self.clients = Clients(database)
        self.keys = RequestKeys(database)
        self.shelf = CheckpointShelf(database, make_folder(folder / "checkpoints"))
        names = ModelNames(database)
        self.sources = Sources(base, self.shelf, names)
        self.library = LibrarySaves(names, base, self.names, make_folder(folder / "library"))
        self.samplers = Samplers(database, base.name, engine)
        self.runs = Runs(
            database, make_folder(folder / "runs"), base.name, self._opened, self.shelf, self.samplers, self.sources,
            self.library,
        )  # fmt: skip
        self._engine = engine
        self._open_pool = open_pool
        self._pool: TrainingPool | None = None
        self._lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._samples: OrderedDict[str, tuple[Promise, Samples | None]] = OrderedDict()
        self._ending = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="haori-sessions-sweep", daemon=True)
        self._sweeper.start()

    def check_base(self, name: str) -> None:
        """Refuse a name that is not the base's.

        Raises:
            InputError: It is none; the sentence says which there are.
        """
        if name not in self.names:
            close = nearest(name, self.names)
            raise InputError(
                f"The model {name[:120]!r} is not served here; there is {', '.join(map(repr, self.names))}"
                + (f" (did you mean {close}?)" if close else "")
                + ". HAORI_MODEL_ALIASES gives a base further names."
            )

    def promise(self, identity: str, account: str) -> Promise:
        """Return a promise of an account by its id.

        Raises:
            GoneError: There is none: it was another account's, or a server before this one gave it.
        """
        gone = GoneError(f"There is no promise {identity[:200]!r} any more; send the request again.")
        with self._lock:
            found = self._samples.get(identity)
        if found is not None:
            if found[0].owner != account:
                raise gone
            return found[0]
        run, _, number = identity.rpartition(":")
        if ":train:" not in run or not number.isascii() or not number.isdigit() or len(number) > 9:
            raise gone
        try:
            return self.runs.find(run, account).promise(int(number)) if int(number) else self.runs.begun(run, account)
        except InputError:
            raise gone from None

    def sample(
        self, turn: Turn, session: str, number: int | str | None, call: SampleCall, mix: "Future[AdapterMix]",
        queue: str,
    ) -> Promise:  # fmt: skip
        """Begin samples; a call that comes again is answered with the same promise.

        Args:
            turn: Whose they are.
            session: The sampling session, or what stands for one.
            number: The request's number in it, or the key that it may come again by; None for one that has neither.
            call: What is wanted.
            mix: The adapters that act.
            queue: The name under which they wait for one another.

        Raises:
            InputError: The prompt cannot be answered, or another call came by this number or key.
            OverloadedError: Too many wait.
        """
        by_key = id_of_key(turn.account, number) if isinstance(number, str) else time.monotonic_ns()
        identity = f"{session}:r:{number}" if isinstance(number, int) else f"{session}:x:{by_key}"
        with self._lock:
            known = self._samples.get(identity)
            if known is not None and known[0].owner == turn.account:
                if known[0].call != call:
                    raise InputError(f"{number!r} came with another request for samples; give each one of its own.")
                return known[0]
            samples = Samples(self._engine(), call)
            names = tuple(f"{identity}/{sample}" for sample in range(call.samples))
            promise = Promise(identity, turn.account, samples.future, samples=names, call=call)
            self._samples[identity] = (promise, samples)
        try:
            if mix.done():
                samples.begin(mix.result(), queue, turn.owner)
            else:
                mix.add_done_callback(lambda done: _begin_later(samples, done, queue, turn.owner))
        except BaseException:
            with self._lock:
                self._samples.pop(identity, None)
            raise
        return promise

    def cancel(self, identity: str, account: str) -> None:
        """End samples that are being written; anything else goes on."""
        promise = self.promise(identity, account)
        with self._lock:
            found = self._samples.get(promise.id)
        if found is not None and found[1] is not None:
            found[1].cancel()

    def mix_of(self, sampler: str, path: str | None, account: str) -> "Future[AdapterMix]":
        """Make the base, a checkpoint or a library adapter ready to be sampled from by a sampler.

        Raises:
            HaoriError: There is none.
        """
        if path is None:
            base: Future[AdapterMix] = Future()
            base.set_result(BASE)
            return base
        folder = self.sources.find(path, account).folder
        return load_for_sampling(self._opened(), self._engine(), f"{LIVE}{sampler}", folder)

    def sampled_path(self, sampler: str, path: str, account: str) -> str:
        """Return what a sampler is made from: the exact path, and of one that was made before that of then.

        Raises:
            HaoriError: There is no such thing, or the sampler was made from another.
        """
        made = self.samplers.made_from(sampler, account)
        if made is None:
            return self.sources.find(path, account).path
        if path not in (made, made.partition("@")[0]):
            raise InputError(
                f"The sampling session {sampler!r} was made from {made}, and {path[:200]!r} was given; take the next "
                "sampling_session_seq_id."
            )
        return made

    def end_session(self, session: str, account: str, ending: Mapping[str, Any] | None = None) -> None:
        """End a session: its runs and samplers leave the memory, and what it saved stays.

        Args:
            session: The session.
            account: Whose it is.
            ending: What the client says of it.
        """
        self.clients.end(session, account, ending or {})
        self.samplers.end_session(session)
        self.runs.put_away({session})

    def close(self) -> None:
        """End everything; what was promised of training is done after the next start."""
        self._ending.set()
        self._sweeper.join()
        if self._pool is not None:
            self._pool.close()
        self.runs.close()

    def _opened(self) -> "TrainingPool":
        with self._pool_lock:
            if self._pool is None:
                self._pool = self._open_pool()
            return self._pool

    def _sweep(self) -> None:
        while not self._ending.wait(_SWEEP_EVERY_S):
            self.runs.put_away(self.clients.silent(_SILENT_S))
            try:
                self.shelf.sweep()
                self.keys.sweep()
            except HaoriError as error:  # the database, for now
                print(f"Warning: what has expired waits: {in_full(error)}", file=sys.stderr)
            now = time.monotonic()
            with self._lock:
                for identity, (promise, samples) in list(self._samples.items()):
                    had = promise.retrieved_s
                    if had is not None and now - had > _KEEP_RETRIEVED_S:
                        del self._samples[identity]
                    elif samples is not None and samples.made_s < now - _KEEP_S:
                        samples.cancel()
                        del self._samples[identity]


def _begin_later(samples: Samples, mix: "Future[AdapterMix]", queue: str, owner: str) -> None:
    try:
        samples.begin(mix.result(), queue, owner)
    except HaoriError as error:
        if not samples.future.done():
            samples.future.set_exception(error)
