"""Walks a mounted tree: which files are there, and a stamp of each that changes whenever the file or a sidecar does."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from haori.library.mounts.sidecars import sidecar_names

__all__ = ["Seen", "Tree", "stamp_of", "walk"]

ENDINGS = (".safetensors", ".gguf", ".pt", ".ckpt")
"""What a tree of adapters holds; the last two are pickles, which are listed and never read."""

# Control characters, and those that turn the direction of writing: a name with them can look like another.
_MISLEADING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REST_NS = 2_000_000_000


class Seen(NamedTuple):
    """A file as it is now.

    Attributes:
        stamp: Size, times and inode of the file and its sidecars.
        settled: It was last changed so long ago that a further change would show in the stamp.
        sidecars: Names of its sidecars.
        problem: Why its name cannot be used; None if it can.
    """

    stamp: str
    settled: bool
    sidecars: tuple[str, ...]
    problem: str | None


@dataclass
class Tree:
    """What a walk found, by place: the path from the root with `/` between names."""

    files: dict[str, Seen] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def walk(root: Path) -> Tree:
    """Look at every file and folder under `root` without opening a file. Links that lead out of it are not followed."""
    tree = Tree()
    real = Path(os.path.realpath(root))
    started = time.time_ns()
    waiting = [""]
    while waiting:
        place = waiting.pop()
        folder = root / place if place else root
        try:
            changed = folder.stat().st_mtime_ns
            tree.folders[place] = changed if changed < started - _REST_NS else 0  # may change once more, unseen
            with os.scandir(folder) as scan:
                entries = {entry.name: entry for entry in scan}
        except OSError as error:
            tree.problems.append(f"The folder {ascii_if_odd(str(folder))} cannot be read: {error.strerror}.")
            continue
        waiting += [_join(place, entry.name) for entry in _folders(entries, folder, real, tree)]
        for entry in entries.values():
            if entry.name.lower().endswith(ENDINGS) and not entry.name.startswith("."):
                _look(entry, _join(place, entry.name), entries, real, started, tree)
    return tree


def stamp_of(path: Path, sidecars: tuple[str, ...]) -> str | None:
    """Return the stamp of a file as it is now; None if it is gone."""
    try:
        return _stamp([path.stat(), *((path.parent / name).stat() for name in sidecars)])
    except OSError:
        return None


def ascii_if_odd(text: str) -> str:
    """Return a path as a message can show it."""
    return ascii(text) if _MISLEADING.search(text) else repr(text)


def _folders(
    entries: Mapping[str, "os.DirEntry[str]"], folder: Path, real: Path, tree: Tree
) -> Iterator["os.DirEntry[str]"]:
    for entry in entries.values():
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if not entry.is_symlink():
            yield entry
        elif not _is_below(folder / entry.name, real):
            tree.problems.append(
                f"{ascii_if_odd(str(folder / entry.name))} is a link that leads out of the tree and is not followed; "
                "mount the folder it leads to."
            )


def _look(
    entry: "os.DirEntry[str]", place: str, beside: Mapping[str, "os.DirEntry[str]"], real: Path, started: int,
    tree: Tree,
) -> None:  # fmt: skip
    path = Path(entry.path)
    if entry.is_symlink() and not _is_below(path, real):
        tree.problems.append(f"{ascii_if_odd(str(path))} is a link that leads out of the tree and is not followed.")
        return
    inside = [name for name, other in beside.items() if not other.is_symlink() or _is_below(Path(other.path), real)]
    sidecars = sidecar_names(entry.name, inside)
    try:
        if not entry.is_file():
            return
        stats = [entry.stat(), *(beside[name].stat() for name in sidecars)]
    except OSError as error:
        tree.problems.append(f"{ascii_if_odd(str(path))} cannot be read: {error.strerror}.")
        return
    problem = None
    if _MISLEADING.search(place):
        problem = f"Its name {place!a} holds control characters; rename it."
    changed = max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
    key = place if problem is None else ascii(place)
    tree.files[key] = Seen(_stamp(stats), changed < started - _REST_NS, sidecars, problem)


def _stamp(stats: list[os.stat_result]) -> str:
    return ";".join(f"{stat.st_size},{stat.st_mtime_ns},{stat.st_ctime_ns},{stat.st_ino}" for stat in stats)


def _is_below(path: Path, real: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(real)


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
