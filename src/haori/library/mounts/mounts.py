"""The mounted trees of a library: listed and found beside what is stored, read in place, never written to.

A scan compares the stamp of every file with the one remembered and reads only what is new or changed. A file that
cannot be used is listed with the reason and hurts no other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from haori.core.errors import FileFormatError, LibraryError, nearest
from haori.core.progress_bar import progress_bar
from haori.core.records import AdapterCard
from haori.library.file_hashes import hash_weight_file
from haori.library.mounts.described import UNKNOWN, describe
from haori.library.mounts.kept import Fitting, KeptFile, KeptFiles
from haori.library.mounts.record import Mount, MountRecord
from haori.library.mounts.sidecars import Sidecars
from haori.library.mounts.walking import Seen, Tree, stamp_of, walk
from haori.library.searching.entries import Entry, Found, entry_of, words_of
from haori.library.searching.query import Query, folded
from haori.library.specs import likely

__all__ = ["MountedFile", "Mounts", "Scan"]

_BATCH = 500
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class MountedFile:
    """An adapter that lies in a mounted tree.

    Attributes:
        path: The file.
        card: What its header and its sidecars say; never proved.
        name: What it is asked for by, such as `loras/styles/smile`.
        mount: Name of the tree.
        sidecars: What stands beside it.
    """

    path: Path
    card: AdapterCard
    name: str
    mount: str
    sidecars: Sidecars


class Scan(NamedTuple):
    """What a scan of one tree found; `problems` are sentences about files and folders that could not be used."""

    mount: str
    path: Path
    files: int
    changed: int
    problems: tuple[str, ...]


class Mounts:
    """The mounts of the library under `root`."""

    def __init__(self, root: Path) -> None:
        self._record = MountRecord(root)
        self._kept = KeptFiles(root / "mounted.sqlite")

    def add(self, folder: Path, name: str | None = None) -> Scan:
        """Mount a folder and scan it.

        Raises:
            InputError: It is no folder.
            LibraryError: The name is not allowed or taken, or the folder lies in another mount or in the library.
        """
        chosen = self._record.add(folder, name)
        return self._scan(chosen, self._record.read()[chosen])

    def remove(self, name: str) -> Path:
        """Forget a mount and return its folder, which stays as it is.

        Raises:
            LibraryError: There is none of that name.
        """
        path = self._record.remove(name).path
        self._kept.put_folders(name, {})
        return path

    def rescan(self) -> tuple[Scan, ...]:
        """Look at every mounted tree and read what is new or changed in it."""
        return tuple(self._scan(name, mount) for name, mount in self._record.read().items())

    def find(self, query: Query) -> Found:
        """Return the entries that a query describes, as of the last scan, of the trees that are there."""
        if not (mounts := self._record.read()):
            return Found((), {})
        there = {name for name, mount in mounts.items() if mount.path.is_dir()}
        found = self._kept.find(query)
        return Found(tuple(entry for entry in found.entries if entry.mount in there), found.close)

    def beside(self) -> dict[str, tuple[str, str]]:
        """Return, by `mount/place`, the alias of every file and what its sidecars say, as JSON, as of the last scan."""
        return self._kept.beside()

    def get(self, spec: str, digits: str | None = None) -> MountedFile | None:
        """Find one file; None if nothing mounted is called so.

        Args:
            spec: `mount/folder/name`, a file's name, the name its trainer gave it, or a hash.
            digits: The digits of a hash that `spec` may be.

        Raises:
            LibraryError: Several files fit, or it cannot be used; the reason is named.
        """
        if not (mounts := self._record.read()):
            return None
        fitting = self._kept.fitting(spec, digits)
        if not (fitting.files and _is_current(fitting, mounts)):
            for name, mount in mounts.items():
                self._scan(name, mount)
            fitting = self._kept.fitting(spec, digits)
        rows = [row for row in fitting.files if row.mount in mounts]
        if not rows:
            self._refuse_unknown(spec, digits, mounts)
            return None
        if len(rows) > 1:
            names = " and ".join(repr(row.name) for row in rows[:4])
            more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
            raise LibraryError(f"{spec!r} may mean {names}{more}; ask for one of them by its full name.")
        row = rows[0]
        by_name = "/" in spec or folded(spec) in (row.stem, row.alias)
        return self._file(row, mounts[row.mount], None if by_name else digits)

    def is_mounted(self, spec: str) -> bool:
        """Say whether a spec is a path in a mounted tree."""
        mount, slash, _ = spec.partition("/")
        return bool(slash) and mount in self._record.read()

    def hash_all(self) -> int:
        """Read the content of every file that was not hashed yet, and return how many those were.

        Raises:
            OSError: A file cannot be read.
        """
        mounts = self._record.read()
        files = [row for row in self._kept.unhashed() if row.mount in mounts]
        total = sum((mounts[row.mount].path / row.place).stat().st_size for row in files)
        with progress_bar("Hashing mounted files", total, "bytes") as advance:
            for start in range(0, len(files), _BATCH):
                done = []
                for row in files[start : start + _BATCH]:
                    path = mounts[row.mount].path / row.place
                    done.append(_hashed(row, path))
                    advance(path.stat().st_size)
                self._kept.put_hashes(done)
        return len(files)

    def _file(self, row: KeptFile, mount: Mount, digits: str | None) -> MountedFile:
        if not mount.path.is_dir():
            raise LibraryError(_gone(row.mount, mount))
        path = mount.path / row.place
        if row.problem is not None:
            raise LibraryError(f"The mounted file {row.name!r} cannot be used: {row.problem}")
        if not row.sha256:
            row = _hashed(row, path)
            if path.stat().st_size > _SMALL_BYTES:  # reading a small file again takes less than writing this down
                self._kept.put_hashes([row])
        hashes = dict(pair.split("=") for pair in row.sha256.split())
        if digits is not None and not any(value.startswith(digits) for value in hashes.values()):
            raise LibraryError(
                f"The header or a sidecar of {row.name!r} states the hash {digits!r}, but its content has not: "
                f"its sha256 is {hashes['sha256']}."
            )
        card = AdapterCard.model_validate_json(row.card)
        card = card.model_copy(update={"id": f"sha256:{hashes['sha256']}", "file_hashes": hashes})
        return MountedFile(path, card, row.name, row.mount, Sidecars.model_validate_json(row.sidecars))

    def _refuse_unknown(self, spec: str, digits: str | None, mounts: Mapping[str, Mount]) -> None:
        """Say what is near a path in a mount, or that a hash may not be known yet; other names may be stored ones."""
        mount = spec.partition("/")[0]
        if "/" in spec and mount in mounts:
            hint = nearest(spec, likely(spec, self._kept.names(mount))) or "`haori library list` shows what it holds."
            raise LibraryError(f"The mount {mount!r} has no adapter {spec[:200]!r}; {hint}")
        if digits is not None and len(digits) >= 8 and (count := len(self._kept.unhashed())):
            raise LibraryError(
                f"Nothing is known by the hash {spec!r}, but {count:,} mounted files were not hashed yet; run "
                "`haori library mounts --hash` and ask again."
            )

    def _scan(self, name: str, mount: Mount) -> Scan:
        if not mount.path.is_dir():
            return Scan(name, mount.path, 0, 0, (_gone(name, mount),))
        tree = walk(mount.path)
        known = self._kept.stamps(name)
        names = _names(name, tree)
        changed = [
            place for place, seen in tree.files.items()
            if (held := known.get(place)) is None or held[:3] != (seen.stamp, 1, names[place])
        ]  # fmt: skip
        hashed = {place for place, held in known.items() if held.hashed}
        gone = known.keys() - tree.files.keys()
        if gone:
            self._kept.put(name, gone, [])
        with progress_bar("Reading mounted files", len(changed), "files") as advance:
            for start in range(0, len(changed), _BATCH):
                batch = sorted(changed[start : start + _BATCH])
                files = [_read(name, mount.path, place, tree.files[place], names[place]) for place in batch]
                self._kept.put(name, (), files)
                # What was changed just now is read again, and its hash is still wanted.
                again = [file for file, _ in files if file.place in hashed and file.problem is None]
                if again:
                    self._kept.put_hashes([_hashed(file, mount.path / file.place) for file in again])
                advance(len(batch))
        if tree.folders != self._kept.folders(name):
            self._kept.put_folders(name, tree.folders)
        return Scan(name, mount.path, len(tree.files), len(changed), tuple(tree.problems))


def _is_current(fitting: Fitting, mounts: Mapping[str, Mount]) -> bool:
    """Say whether these files are as they were scanned, and no other that fits can have come since."""
    for row in fitting.files:
        if row.mount not in mounts or not row.settled:
            return False
        sidecars = tuple(filter(None, row.sidecar_names.split("\n")))
        if stamp_of(mounts[row.mount].path / row.place, sidecars) != row.stamp:
            return False
    return all(
        _changed_ns(mounts[name].path / place) == changed for name, place, changed in fitting.folders if name in mounts
    )


def _hashed(row: KeptFile, path: Path) -> KeptFile:
    return row._replace(
        sha256=" ".join(f"{name}={digits}" for name, digits in hash_weight_file(path).as_dict().items())
    )


def _names(mount: str, tree: Tree) -> dict[str, str]:
    """Return the name of each file by its place: without its ending, where no other is called so."""
    stems: dict[str, list[str]] = {}
    for place in tree.files:
        stems.setdefault(place.rpartition(".")[0], []).append(place)
    return {
        place: f"{mount}/{stem if len(places) == 1 else place}" for stem, places in stems.items() for place in places
    }


def _read(mount: str, root: Path, place: str, seen: Seen, name: str) -> tuple[KeptFile, Entry]:
    path = root / place
    kept = KeptFile(
        mount, place, name, folded(path.stem), "", seen.stamp, int(seen.settled),
        "\n".join(seen.sidecars), "", "", "", "", seen.problem,
    )  # fmt: skip
    adapter = f"{mount}/{place}"
    try:
        found = None if seen.problem else describe(path, seen.sidecars)
        problem = seen.problem
    except (FileFormatError, OSError, ValueError) as error:
        found, problem = None, " ".join(str(error).split())
    if found is None:
        return kept._replace(problem=problem), _problem_entry(name, adapter, mount, path, str(problem))
    card = found.card
    entry = entry_of(card, name, 0, adapter, mount)
    notes = (found.sidecars.notes, found.sidecars.negative_prompt, found.alias, *found.hashes)
    entry = entry._replace(
        text="\n".join((entry.text, folded("\n".join(notes)))),
        words=words_of(name, *card.trigger_words, *card.tags, found.alias),
    )
    return kept._replace(
        alias=folded(found.alias),
        hashes="".join(f" {digits}" for digits in found.hashes),
        card=card.model_dump_json(),
        sidecars=found.sidecars.model_dump_json(),
    ), entry


def _problem_entry(name: str, adapter: str, mount: str, path: Path, problem: str) -> Entry:
    try:
        size = path.stat().st_size
    except OSError:
        size = 0
    return Entry(
        name=name, version=0, adapter=adapter, base=UNKNOWN, base_id="", family=None, method=UNKNOWN, format=UNKNOWN,
        task=UNKNOWN, rank=None, size_bytes=size, licence=None, proved="no", created="", triggers="", tags="",
        metrics="{}", mount=mount, problem=problem, words=words_of(name), text=folded(name),
    )  # fmt: skip


def _gone(name: str, mount: Mount) -> str:
    return f"The mounted folder {str(mount.path)!r} is not there; connect it, or run `haori library unmount {name}`."


def _changed_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1
