"""Reads another tool's file, YAML or JSON, strictly: a key given twice is an error, and secrets never get further.

A secret (a token, a password, an address with one in it) is replaced by `SECRET` as soon as it is read, so that no
later step can print or copy it.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from haori.core.errors import RecipeError

__all__ = ["holds_secret", "is_empty", "read_document"]

_LARGEST_BYTES = 4_000_000
_MOST_VALUES = 50_000
_SECRET_NAMES = re.compile(
    r"api_?key|secret|passw|credential|webhook|(^|_)auth($|_)|private_key|access_key|token$", re.IGNORECASE
)
_NO_SECRET = re.compile(
    r"(^|_)(bos|eos|pad|unk|sep|cls|mask|eot|bot|image|video|audio|invocation|stop)_token$|use_auth_token$", re.I
)
"""Special tokens of a model, and switches."""
_SECRET_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.|://[^/\s@]*:[^/\s@]+@"
)


class _Secret:
    """Stands for a secret that was in the file."""

    def __repr__(self) -> str:
        return "(a secret)"


SECRET = _Secret()


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value != "<<" and str(key_node.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def read_document(path: Path) -> dict[str, Any]:
    """Return the table of keys in a file, with secrets replaced.

    Raises:
        RecipeError: There is no such file, it is no YAML or JSON, or it holds no table of keys.
    """
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise RecipeError(f"{str(path)!r} {kind}; give the configuration of another tool, in YAML or JSON.")
    if path.stat().st_size > _LARGEST_BYTES:
        raise RecipeError(f"{str(path)!r} is {path.stat().st_size:,} bytes long, too long for a configuration.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        read = _parse(text, json_only=path.suffix.lower() == ".json")
    except UnicodeDecodeError:
        raise RecipeError(f"{str(path)!r} is not UTF-8 text; a configuration is a YAML or JSON file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {_one_line(error)}.") from None
    if not isinstance(read, dict) or not read:
        raise RecipeError(f"{str(path)!r} must hold a table of keys, as the configurations of training tools do.")
    cleaned = _Cleaner(path).clean(read, "")
    assert isinstance(cleaned, dict)
    return cleaned


def is_empty(value: Any) -> bool:
    """Say whether a key with this value is as good as absent."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def holds_secret(value: Any) -> bool:
    """Say whether a secret was in a value."""
    if isinstance(value, dict):
        return any(holds_secret(inner) for inner in value.values())
    return value is SECRET or (isinstance(value, list) and any(holds_secret(inner) for inner in value))


class _Cleaner:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = _MOST_VALUES

    def clean(self, value: Any, name: str) -> Any:
        """Return a value without secrets, its keys as texts."""
        self._left -= 1
        if self._left < 0:
            raise RecipeError(f"{str(self._path)!r} holds more than {_MOST_VALUES:,} values; this is no configuration.")
        if _SECRET_NAMES.search(name) and not _NO_SECRET.search(name) and not (is_empty(value) or value is False):
            return SECRET
        if isinstance(value, dict):
            return {str(key): self.clean(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.clean(inner, name) for inner in value]
        return SECRET if isinstance(value, str) and _SECRET_VALUES.search(value) else value


def _parse(text: str, *, json_only: bool) -> Any:
    if json_only:
        return json.loads(text, object_pairs_hook=_once)
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its tables are nested too deeply"
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or (str(error) if not isinstance(error, yaml.YAMLError) else "")
    return f"{problem.splitlines()[0] if problem else 'it is no YAML'}{where}"
