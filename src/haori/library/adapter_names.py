"""Names that an adapter may not have, and bare names that do not say what is meant, because a base has them.

A server answers the name of its base with the bare base. An adapter of that name would be one thing there and another
in the terminal, so none is stored or served under it; one that is there already is asked for with its version.
"""

import re
import unicodedata
from pathlib import Path

from haori.core.errors import LibraryError

__all__ = ["check_no_base_name", "name_for", "refuse_base_name"]

_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST = 100


def name_for(path: Path) -> str:
    """Return the name that an adapter gets where none is given: that of its file or folder, in allowed characters.

    Raises:
        LibraryError: Nothing of the name can be used.
    """
    stem = path.resolve().stem if path.is_file() else path.resolve().name
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    found = _NOT_ALLOWED.sub("-", plain).strip("-._")[:_LONGEST].rstrip("-._")
    if not found:
        raise LibraryError(f"No name can be made of {stem[:80]!r}: give one with --name, of letters, digits and '-'.")
    return found


def check_no_base_name(name: str, base_name: str) -> None:
    """Refuse a name for a new adapter that is a base's.

    Args:
        name: Without version.
        base_name: What the base is called that the adapter is for.

    Raises:
        LibraryError: It is the name of that base, of one on this machine, of one in the catalogue, or of one that
            is part of Haori.
    """
    from haori.bases.catalogue import CATALOGUE
    from haori.bases.embedded import EMBEDDED
    from haori.bases.registry import registered_names

    if name in {base_name, *CATALOGUE, *EMBEDDED, *registered_names()}:
        raise LibraryError(
            f"An adapter cannot be called {name!r}: a base is called so, and a server answers that name with the bare "
            "base. Choose another name."
        )


def refuse_base_name(spec: str, base_name: str, full_name: str) -> None:
    """Refuse a bare name that means the base on a server, and ask for the version.

    Raises:
        LibraryError: The name that was asked for is the base's.
    """
    if spec == base_name:
        raise LibraryError(
            f"{spec!r} is the name of a base and of an adapter; ask for the adapter with its version, {full_name!r}."
        )
