"""What runs and samplers begin with: a checkpoint, or an exact version of a library adapter. No path is opened."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError, LibraryDamagedError, LibraryError
from haori.jobs.missing import MissingError
from haori.jobs.model_names import ModelNames
from haori.jobs.sessions.checkpoints import CheckpointShelf
from haori.jobs.sessions.gone import GoneError
from haori.jobs.sessions.paths import CheckpointPath

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library import StoredAdapter

__all__ = ["LIBRARY", "Source", "Sources"]

LIBRARY = "library:"


class Source(NamedTuple):
    """Weights that something begins with.

    Attributes:
        path: `tinker://<run>/weights/<name>`, or `library:NAME@VERSION`; asked for again it means the same.
        folder: Where the files are.
        adapter: Content id of a library adapter; None for a checkpoint.
    """

    path: str
    folder: Path
    adapter: str | None = None


class Sources:
    """Everything that can be begun with.

    Args:
        base: Which adapters have to be of.
        shelf: Holds the checkpoints.
        names: Say whose an adapter is.
    """

    def __init__(self, base: "Base", shelf: CheckpointShelf, names: ModelNames) -> None:
        self._base, self._shelf, self._names = base, shelf, names

    def find(self, path: str, account: str, adapter: str | None = None) -> Source:
        """Return what a path means now for an account.

        Args:
            path: `tinker://<run>/weights/<name>`, `library:NAME` or `library:NAME@VERSION`.
            account: Who asks.
            adapter: What was found there before: content id of a library adapter.

        Raises:
            MissingError: There is no such thing for this account.
            GoneError: It is another adapter than before.
            InputError: The path is none, or the adapter is of another base.
        """
        if not path.startswith(LIBRARY):
            found = CheckpointPath.parse(path)
            self._shelf.find(found, account)
            return Source(path, self._shelf.folder(found))
        stored = self._adapter(path.removeprefix(LIBRARY), account)
        if stored.card.base.id != self._base.id:
            raise InputError(
                f"{stored.name!r} is an adapter of the base {stored.card.base.name!r}, and this server trains "
                f"{self._base.name!r}."
            )
        exact = f"{LIBRARY}{stored.name}"
        if adapter is not None and stored.card.id != adapter:
            raise GoneError(
                f"{exact} is another adapter than the one that this began with, which was removed from the library; "
                "begin a new run."
            )
        return Source(exact, stored.path, stored.card.id)

    def _adapter(self, name: str, account: str) -> "StoredAdapter":
        """Return an adapter of the library by one of its own names, unless it belongs to another account.

        Digits of an id are no name: a key allows names by patterns, and digits could stand for any adapter.
        """
        from haori.library import Library

        missing = MissingError(f"There is no adapter {name[:200]!r} that this account may go on from.")
        try:
            stored = Library().get(name)
        except LibraryDamagedError:
            raise
        except LibraryError:  # its sentence names others that are near
            raise missing from None
        if name not in (stored.name, stored.name.partition("@")[0]):
            raise missing
        claims = self._names.claims([stored.card.id], [stored.name])
        if claims and not any(claim.owner == account for claim in claims):
            raise missing
        return stored
