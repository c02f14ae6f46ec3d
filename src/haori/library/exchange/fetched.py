"""What was fetched, with all that its site says of it."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from haori.library.stated import Stated

__all__ = ["Fetched"]


@dataclass(frozen=True)
class Fetched:
    """An adapter on this machine that came from elsewhere.

    Attributes:
        path: A PEFT folder, or the file of an adapter that is one file.
        sha256: Digits of the hash of the weight file.
        is_checked: The site states that hash; otherwise there was nothing to compare it with.
        called: What it is called there, as the start of a name here.
        said: What the site says of it, with where it came from.
        kept_in: Folder of the download cache that may go once the adapter is stored; None if others share it.
    """

    path: Path
    sha256: str
    is_checked: bool
    called: str
    said: Stated = field(default_factory=Stated)
    kept_in: Path | None = None

    def discard(self) -> None:
        """Delete the download, once it is stored."""
        if self.kept_in is not None:
            shutil.rmtree(self.kept_in, ignore_errors=True)
