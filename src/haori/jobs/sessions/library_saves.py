"""Checkpoints that go into the library as they are saved: under which name, whose it is, and the proof.

A run that is made with `user_metadata={"haori.library": NAME}` asks for it. The name belongs to its account from then
on. Each proof runs in a process of its own, one after another, so that it disturbs neither training nor answers.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import (
    HaoriError,
    InputError,
    LibraryDamagedError,
    LibraryError,
    TrainingError,
    VerificationError,
    nearest,
)
from haori.jobs.model_names import ModelName, ModelNames
from haori.jobs.process import JobSpec, run_job
from haori.jobs.sessions.paths import CheckpointPath, folder_name

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["LIBRARY_KEY", "LibrarySaves", "read_library_name"]

LIBRARY_KEY = "haori.library"
_OURS = "haori."
_MOST_BYTES = 16 << 10


def read_library_name(metadata: Mapping[str, Any] | None) -> str | None:
    """Return the name in the library that a run's metadata asks for; None where it asks for none.

    Raises:
        InputError: A key that begins with `haori.` is not known, the name is no text, or the whole is too long.
    """
    if not metadata:
        return None
    size = len(json.dumps(metadata).encode())
    if size > _MOST_BYTES:
        raise InputError(f"user_metadata takes {size:,} bytes as JSON; it may take {_MOST_BYTES:,}.")
    for key in metadata:
        if key.startswith(_OURS) and key != LIBRARY_KEY:
            close = nearest(key, [LIBRARY_KEY])
            raise InputError(
                f"user_metadata has no key {key[:100]!r} that this server knows; of those that begin with {_OURS!r} "
                f"there is {LIBRARY_KEY!r}{'; ' + close if close else '.'}"
            )
    name = metadata.get(LIBRARY_KEY)
    if name is not None and not isinstance(name, str):
        raise InputError(f"{LIBRARY_KEY!r} of user_metadata is {name!r:.100}; give the name of an adapter as text.")
    return name


class LibrarySaves:
    """The way of checkpoints into the library; every method may be called from any thread.

    Args:
        names: Say whose a name is.
        base: What is trained over.
        base_names: What the base is called here.
        root: Holds a folder for each proof that runs, or that ended in a way that nobody expected.
    """

    def __init__(self, names: ModelNames, base: "Base", base_names: Sequence[str], root: Path) -> None:
        self._names, self._base, self._base_names, self._root = names, base, tuple(base_names), root
        self._proofs = ThreadPoolExecutor(1, "haori-library-proofs")

    def reserve(self, name: str, account: str, *, admin: bool) -> None:
        """Let an account save adapters of a name from now on; nobody else may use them or save any.

        A name that the library has already, and that is no account's, stays everybody's: an admin alone may add to it.

        Raises:
            InputError: The name is not allowed, or is another's.
        """
        from haori.library import Library
        from haori.library.adapter_names import check_no_base_name
        from haori.library.store import check_name

        try:
            check_name(name)
            for base in self._base_names:
                check_no_base_name(name, base)
        except LibraryError as error:
            raise InputError(str(error)) from None
        is_everybodys = not self._names.owners(name) and bool(Library().names().versions(name))
        if is_everybodys and admin:
            return
        row = ModelName(
            name=name, owner=account, library_name=name, base=self._base.name, created=time.time()
        )  # fmt: skip
        if is_everybodys or not self._names.reserve(row):
            raise InputError(f"The name {name!r} of the library is taken; choose another for {LIBRARY_KEY!r}.")

    def put(
        self, path: CheckpointPath, folder: Path, number: int, name: str, done: Callable[[str], Any]
    ) -> "Future[Any]":
        """Prove a checkpoint and make it the next version of a name; one that did so before stays that version.

        Args:
            path: The checkpoint.
            folder: Its files.
            number: The request that saved it.
            name: In the library.
            done: Is given the name with version; what it returns is what the future gives.
        """
        return self._proofs.submit(lambda: done(self._prove(path, folder, number, name)))

    def close(self) -> None:
        """Wait for the proof under way; what else waits is done after the next start."""
        self._proofs.shutdown(cancel_futures=True)

    def _prove(self, path: CheckpointPath, folder: Path, number: int, name: str) -> str:
        base = self._base
        arguments = {
            "folder": str(folder), "base": str(base.path) if base.source.startswith("folder:") else base.name,
            "name": name, "checkpoint": str(path), "request": number, "lock": str(self._root / ".lock"),
        }  # fmt: skip
        place = self._root / f"{folder_name(path.run)}-{number:09d}"
        result = run_job(JobSpec(task="haori.jobs.sessions.adding:add_saved", arguments=arguments, folder=place))
        try:
            stored: str = result.require()["name"]
        except HaoriError as error:
            said = f"The checkpoint was saved as {path}, but did not go into the library as {name!r}: {error}"
            by_user = isinstance(error, InputError | VerificationError) and not isinstance(error, LibraryDamagedError)
            if by_user:
                shutil.rmtree(place, ignore_errors=True)
            raise (InputError if by_user else TrainingError)(said) from error
        shutil.rmtree(place, ignore_errors=True)
        return stored
