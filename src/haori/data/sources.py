"""Where rows come from: a file, a folder of files, or a dataset on the hub.

A folder is read recursively in sorted order, hidden files and what `datasets` writes about a dataset left out. Text
files (.txt) in a folder are read only when it holds no other data file, so that a README.txt beside the data is not
taken for a row. A name of the form `org/name` that is no path is a hub dataset. Rows are streamed; nothing here holds
more than one batch.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from haori.core.errors import DataError, nearest
from haori.core.hashing import hash_data, hash_file
from haori.core.settings import settings
from haori.core.user_path import user_path
from haori.data.folder_files import files_of
from haori.data.readers import READERS, RawRow, shorten

__all__ = ["Source", "find_source", "hub_splits"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ABOUT = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json"})


@dataclass(frozen=True)
class Source:
    """Rows that can be read any number of times.

    Attributes:
        name: As the user gave it.
        files: Data files with the names that people see; empty for a hub dataset.
        ignored: Files of a folder that are no data files.
        hub: Revision and split of a hub dataset, else None.
        remarks: What was taken of a folder or hub dataset with several splits, and what was not.
    """

    name: str
    files: tuple[tuple[Path, str], ...] = ()
    ignored: tuple[str, ...] = ()
    hub: tuple[str | None, str] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path | None:
        """Return the folder that the files are in; None for a single file or a hub dataset."""
        path = user_path(self.name)
        return path if self.hub is None and path.is_dir() else None

    @property
    def size_bytes(self) -> int:
        """Return the size of all files (0 for a hub dataset)."""
        return sum(path.stat().st_size for path, _ in self.files)

    @cached_property
    def content_hash(self) -> str:
        """Return the hash of all bytes and of the names that origins are made of."""
        if self.hub is not None:
            return hash_data([self.name, self.hub, str(self._dataset._fingerprint)])
        return hash_data([[name, hash_file(path)] for path, name in self.files])

    def features(self) -> dict[str, Any]:
        """Return what a hub dataset says of its columns, as `datasets` names their kinds."""
        return dict(self._dataset.features or {})

    def rows(self, limit: int | None = None) -> Iterator[RawRow]:
        """Yield the rows, at most `limit`; `RawRow.done` counts over all files.

        A file that cannot be read on ends with a row that carries the problem.
        """
        return islice(self._hub_rows() if self.hub is not None else self._file_rows(), limit)

    def _file_rows(self) -> Iterator[RawRow]:
        before = 0
        for path, name in self.files:
            try:
                for row in READERS[path.suffix.lower()](path, name):
                    yield RawRow(row.origin, row.file, row.values, before + row.done, row.problem)
            except DataError as error:
                yield RawRow(name, name, done=before + path.stat().st_size, problem=error)
            except OSError as error:
                problem = DataError(f"{name} cannot be read: {error.strerror or error}.")
                yield RawRow(name, name, done=before, problem=problem)
            before += path.stat().st_size

    def _hub_rows(self) -> Iterator[RawRow]:
        for number, values in enumerate(self._dataset, start=1):
            yield RawRow(f"{self.name}:{number}", self.name, values)

    @cached_property
    def _dataset(self) -> Any:
        return _load_hub(self.name, *(self.hub or (None, "train")))


def find_source(given: str, *, split: str = "train", revision: str | None = None) -> Source:
    """Find the files behind `given`, or take it for a hub dataset.

    Raises:
        DataError: There is no such file, the folder holds no data or far too many files, or the kind of file is not
            known.
    """
    path = user_path(given)
    known = ", ".join(sorted(READERS))
    if path.is_dir():
        return _find_in_folder(path, given, known)
    if path.exists():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{given!r} is of an unknown kind; data files end in {known}.")
        if not path.stat().st_size:
            raise DataError(f"{given!r} is empty.")
        return Source(given, files=((path, given),))
    if _HUB_ID.fullmatch(given) and path.suffix.lower() not in READERS:
        return Source(given, hub=(revision, split))
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside)
    raise DataError(f"There is no data file or folder {given!r}{'; ' if hint else '.'}{hint}")


def _find_in_folder(folder: Path, given: str, known: str) -> Source:
    found = files_of(folder, given)
    data = [path for path in found if path.suffix.lower() in READERS and path.stat().st_size and not _is_about(path)]
    if tables := [path for path in data if path.suffix.lower() != ".txt"]:
        data = tables
    if not data:
        raise DataError(f"The folder {given!r} holds no data; data files end in {known} and are not empty.")
    chosen = set(data)
    ignored = tuple(str(path.relative_to(folder)) for path in found if path not in chosen)
    return Source(
        given, files=tuple((path, str(Path(given) / path.relative_to(folder))) for path in data), ignored=ignored
    )


def _is_about(path: Path) -> bool:
    beside = path.with_name("dataset_info.json")
    return path.name in _ABOUT or (path.name == "state.json" and beside.is_file())


def hub_splits(name: str, revision: str | None) -> tuple[str, ...]:
    """Return the splits of a hub dataset; none where they cannot be known before it is loaded.

    Raises:
        DataError: The dataset cannot be reached.
    """
    from datasets.inspect import SplitsNotFoundError

    def ask(datasets: Any) -> tuple[str, ...]:
        try:
            return tuple(map(str, datasets.get_dataset_split_names(name, revision=revision)))
        except SplitsNotFoundError:
            return ()

    found: tuple[str, ...] = _ask_hub(name, revision, ask)
    return found


def _load_hub(name: str, revision: str | None, split: str) -> Any:
    """Fetch a hub dataset into the Hugging Face cache (Arrow files, memory-mapped).

    With `HF_HUB_OFFLINE` set, what is in that cache is used.
    """
    return _ask_hub(name, revision, lambda datasets: datasets.load_dataset(name, split=split, revision=revision))


def _ask_hub(name: str, revision: str | None, ask: Callable[[Any], Any]) -> Any:
    """Ask `datasets` something about a hub dataset, quietly, and explain why it has no answer."""
    missing = f"There is no file or folder {name!r}, and as a dataset on the hub it"
    if settings().offline:
        raise DataError(f"{missing} cannot be fetched: HAORI_OFFLINE is set.")
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import logging as hub_logging

    shown, verbosity = datasets.utils.logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        if not constants.HF_HUB_OFFLINE:  # a quick answer: load_dataset would try for half a minute
            HfApi().dataset_info(name, revision=revision, timeout=10)
        return ask(datasets)
    except Exception as error:  # noqa: BLE001 - a dozen kinds, from five libraries
        text = shorten(str(error), 200)
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "TransportError", "OfflineModeIsEnabled"} or "reach" in text.lower():
            text = "this machine is offline or the hub does not answer"
            raise DataError(f"{missing} cannot be fetched: {text}.") from None
        raise DataError(f"{missing} cannot be read: {text}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()
