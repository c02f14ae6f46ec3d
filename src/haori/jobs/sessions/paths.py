"""Names of what a training session keeps: `tinker://<run>/weights/<name>`, and its folder, which no client sees."""

import re
from pathlib import Path
from typing import NamedTuple

from haori.core.errors import InputError
from haori.core.settings import settings

__all__ = ["CheckpointPath", "check_name", "folder_name", "local_checkpoint"]

_SCHEME = "tinker://"
_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_SEGMENTS = {kind: segment for segment, kind in _KINDS.items()}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[A-Za-z0-9-]{1,64}:train:[0-9]{1,9}")


class CheckpointPath(NamedTuple):
    """Where a checkpoint is: its run, whether it is a `training`, `sampler` or `external` one, and its name."""

    run: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str) -> "CheckpointPath":
        """Read `tinker://<run>/weights/<name>` `.../sampler_weights/<name>` or `.../external_weights/<name>`.

        Raises:
            InputError: It is none of them.
        """
        run, _, rest = path.removeprefix(_SCHEME).partition("/")
        segment, _, name = rest.partition("/")
        fits = path.startswith(_SCHEME) and _RUN.fullmatch(run) and segment in _KINDS and _NAME.fullmatch(name)
        if not fits:
            raise InputError(
                f"{path[:200]!r} names no checkpoint; give tinker://<run>/weights/<name>, or "
                "sampler_weights or external_weights in its place, as it was answered when it was saved."
            )
        return cls(run, _KINDS[segment], name)

    @property
    def id(self) -> str:
        """Its id in the database."""
        return f"{self.run}/{self.short}"

    @property
    def short(self) -> str:
        """Its id within the run."""
        return f"{_SEGMENTS[self.kind]}/{self.name}"

    def __str__(self) -> str:
        return _SCHEME + self.id

    def folder(self, root: Path) -> Path:
        """Its folder."""
        return root / folder_name(self.run) / self.short


def check_name(name: str) -> str:
    """Return the name of a checkpoint.

    Raises:
        InputError: It cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"A checkpoint cannot be called {name[:200]!r}; use up to 128 letters, digits, '.', '_' and '-', and no "
            "'.' at the front."
        )
    return name


def folder_name(run: str) -> str:
    """Return the name of a run's folder."""
    return run.replace(":", "_")


def local_checkpoint(path: str) -> Path:
    """Return the folder of a checkpoint that this machine's server saved.

    Raises:
        InputError: There is none.
    """
    folder = CheckpointPath.parse(path).folder(settings().jobs / "sessions" / "checkpoints")
    if not folder.is_dir():
        raise InputError(f"There is no checkpoint {path} on this machine; `tinker checkpoint list` lists them.")
    return folder
