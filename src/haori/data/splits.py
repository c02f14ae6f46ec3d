"""Which files of a folder are for training, for validation and for testing, by their names or by its dataset card.

Names are read as the hub's viewer reads them: `train.jsonl`, `dev/part-1.csv`, `data/test-00000-of-00002.parquet`, or
the `configs` in the card (README.md). A name with a word for testing in it is never taken for training. Knows nothing
about what stands in the files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from haori.core.errors import DataError, nearest

__all__ = ["FRONT_MATTER", "Splits", "choose_split", "kind_of", "splits_of_folder", "unknown_split"]

_KINDS = {
    "test": ("test", "tests", "testing", "testset", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "valset", "dev", "devset"),
    "train": ("train", "training", "trainset"),
}
_SHARD = re.compile(r"(?P<name>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_CARD_LIMIT_BYTES = 4 << 20


class Splits(NamedTuple):
    """Files by split, and the data files that belong to none."""

    named: dict[str, tuple[Path, ...]]
    rest: tuple[Path, ...]


def kind_of(name: str) -> str | None:
    """Return `train`, `validation` or `test` for a name with such a word in it; None for others."""
    words = set(re.findall("[a-z]+", name.casefold()))
    return next((kind for kind, known in _KINDS.items() if words & set(known)), None)


def splits_of_folder(folder: Path, files: Sequence[Path]) -> Splits:
    """Sort the data files of a folder.

    Raises:
        DataError: Its card describes several datasets, or files that are not there.
    """
    named = _by_card(folder, files)
    if named is None:
        named = {}
        for path in files:
            if (name := _split_name(path.relative_to(folder))) is not None:
                named.setdefault(name, []).append(path)
    taken = {path for paths in named.values() for path in paths}
    return Splits({name: tuple(paths) for name, paths in named.items()}, tuple(p for p in files if p not in taken))


def choose_split(names: Iterable[str], wanted: str, where: str) -> str | None:
    """Return the split that is meant by `wanted`: of that name, or else the only one of its kind; None for none.

    Raises:
        DataError: Several are of its kind.
    """
    present = list(names)
    if wanted in present:
        return wanted
    kind = kind_of(wanted)
    alike = [name for name in present if kind is not None and kind_of(name) == kind]
    if len(alike) > 1:
        raise DataError(
            f"{where} has several splits for {kind}: {', '.join(alike)}; say which with --set data.split={alike[0]}."
        )
    return alike[0] if alike else None


def _split_name(path: Path) -> str | None:
    """Return the split that a relative path names: by its file first, then by its folders, inmost first."""
    shard = _SHARD.fullmatch(path.stem)
    if shard is not None and kind_of(shard["name"]) is not None:
        return shard["name"]
    for part in (path.stem, *reversed(path.parts[:-1])):
        if (kind := kind_of(part)) is not None:
            return kind
    return None


def _by_card(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Return what the dataset card says; None where it says nothing about files."""
    config = _config(folder)
    if config is None:
        return None
    place = f"The card {str(folder / 'README.md')!r}"
    known = set(files)
    found: dict[str, list[Path]] = {}
    for split, patterns in _patterns(config.get("data_files"), place):
        for pattern in patterns:
            full = f"{config['data_dir'].strip('/')}/{pattern}" if isinstance(config.get("data_dir"), str) else pattern
            try:
                matched = sorted(path for path in folder.glob(full) if path in known)
            except (ValueError, NotImplementedError, IndexError):
                matched = []
            if not matched:
                raise DataError(f"{place} names the data file {pattern!r}, which the folder does not hold.")
            found.setdefault(split, []).extend(matched)
    return found


def _config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "README.md"
    try:
        text = path.read_bytes()[:_CARD_LIMIT_BYTES].decode("utf-8", "replace")
        front = FRONT_MATTER.match(text)
        facts = yaml.safe_load(front[1]) if front is not None else None
    except (OSError, yaml.YAMLError):
        return None
    configs = facts.get("configs") if isinstance(facts, dict) else None
    known: list[Any] = configs if isinstance(configs, list) else []
    listed: list[dict[str, Any]] = [item for item in known if isinstance(item, dict) and item.get("data_files")]
    if len(listed) <= 1:
        return listed[0] if listed else None
    chosen = [item for item in listed if item.get("default") is True or item.get("config_name") == "default"]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(str(item.get("config_name")) for item in listed)
    raise DataError(
        f"The card {str(path)!r} describes several datasets ({names}); give the file or sub-folder of one of them."
    )


def _patterns(data_files: Any, place: str) -> Iterable[tuple[str, list[str]]]:
    """Yield (split, patterns) of a card's `data_files`: a text, a list of texts, or a list of {split, path}."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
        listed = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
        if not isinstance(split, str) or len(listed) != (len(paths) if isinstance(paths, list) else 1):
            raise DataError(f"{place} has a data_files that is not understood: give each entry a split and a path.")
        yield split, listed


def unknown_split(where: str, wanted: str, present: Iterable[str]) -> DataError:
    """Return the error for a split that is not there."""
    names = list(present)
    hint = nearest(wanted, names) or "say which with --set data.split=NAME, or give a file itself."
    return DataError(f"{where} has no split {wanted!r}; it has {', '.join(names)}; {hint}")
