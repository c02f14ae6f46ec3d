"""What Civitai says of one version of a model: its JSON, as the API gives it and `.civitai.info` files keep it.

Everything comes from outside: a value of another type than documented counts as not said.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast, get_args

from haori.core.records import Permissions

__all__ = ["CivitaiFile", "CivitaiVersion", "permissions_of", "read_version"]

_MOST, _LONGEST = 200, 2000
_HEX = re.compile(r"[0-9a-fA-F]{8,64}")
_USES = frozenset(get_args(get_args(Permissions.model_fields["commercial_use"].annotation)[0]))


class CivitaiFile(NamedTuple):
    """One file of a version; `hashes` by name in lower case (sha256, autov1, autov2, autov3), digits in lower case."""

    name: str
    kind: str
    format: str
    size_bytes: int | None
    hashes: dict[str, str]
    url: str
    primary: bool


class CivitaiVersion(NamedTuple):
    """One version of a model; `permissions` where the document says them, as that of the whole model does."""

    id: int | None
    model_id: int | None
    name: str
    kind: str
    base: str
    trigger_words: tuple[str, ...]
    tags: tuple[str, ...]
    description: str
    files: tuple[CivitaiFile, ...]
    permissions: Permissions | None


def read_version(document: Mapping[str, Any]) -> CivitaiVersion:
    """Read the JSON of a model version."""
    model = _table(document.get("model"))
    said = " ".join(text for text in (_text(model.get("name")), _text(document.get("name"))) if text)
    return CivitaiVersion(
        id=_number(document.get("id")),
        model_id=_number(document.get("modelId")),
        name=said,
        kind=_text(model.get("type")),
        base=_text(document.get("baseModel")),
        trigger_words=_texts(document.get("trainedWords")),
        tags=_texts(model.get("tags")),
        description=_plain(_text(document.get("description")) or _text(model.get("description"))),
        files=tuple(_file(_table(item)) for item in _list(document.get("files"))),
        permissions=permissions_of(model),
    )


def permissions_of(model: Mapping[str, Any]) -> Permissions | None:
    """Return what the author of a model permits, None unless all four questions are answered.

    A use that is not known grants nothing.
    """
    yes_or_no = [model.get(key) for key in ("allowNoCredit", "allowDerivatives", "allowDifferentLicense")]
    uses = model.get("allowCommercialUse")
    if not all(isinstance(answer, bool) for answer in yes_or_no) or not isinstance(uses, str | list):
        return None
    # A list, one word, or what PostgreSQL makes of a list: "{Image,RentCivit}".
    words = uses.strip("{}").split(",") if isinstance(uses, str) else [str(use) for use in uses]
    granted = tuple(word.strip() for word in words if word.strip() in _USES)
    return Permissions(
        no_credit=cast("bool", yes_or_no[0]),
        commercial_use=cast("Any", granted),
        derivatives=cast("bool", yes_or_no[1]),
        different_licence=cast("bool", yes_or_no[2]),
    )


def _file(item: Mapping[str, Any]) -> CivitaiFile:
    size_kb = item.get("sizeKB")
    hashes = {
        name.lower(): digits.lower()
        for name, digits in _table(item.get("hashes")).items()
        if isinstance(digits, str) and _HEX.fullmatch(digits)
    }
    return CivitaiFile(
        name=_text(item.get("name")),
        kind=_text(item.get("type")),
        format=_text(_table(item.get("metadata")).get("format")),
        size_bytes=round(size_kb * 1024) if isinstance(size_kb, int | float) and 0 <= size_kb < 1e12 else None,
        hashes=hashes,
        url=_text(item.get("downloadUrl")),
        primary=item.get("primary") is True,
    )


def _plain(html: str) -> str:
    """Return the text of a description, which is HTML."""
    return " ".join(re.sub(r"<[^>]*>|&[a-z#0-9]{1,8};", " ", html).split())


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value[:_MOST] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value[:_LONGEST].strip() if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for item in _list(value) if (text := _text(item).strip(" ,"))))


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
