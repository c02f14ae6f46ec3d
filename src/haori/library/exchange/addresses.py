"""Where an adapter may come from: `hub:OWNER/REPO[/FILE][@REVISION]`, `civitai:VERSION_ID`, `https://...`."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from haori.core.errors import InputError

__all__ = ["Address", "CivitaiAddress", "HubAddress", "UrlAddress", "parse_address"]

_PART = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[\w][\w./-]{0,199}")
_VERSION_ID = re.compile(r"[1-9][0-9]{0,15}")


@dataclass(frozen=True)
class HubAddress:
    """A model repository of the Hugging Face hub; `file` chooses one of several adapters in it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """Return it as it is typed."""
        path = self.repo if self.file is None else f"{self.repo}/{self.file}"
        return f"hub:{path}" if self.revision is None else f"hub:{path}@{self.revision}"


@dataclass(frozen=True)
class CivitaiAddress:
    """A version of a model on Civitai, by the number in `modelVersionId=` of its page."""

    version: int

    def __str__(self) -> str:
        """Return it as it is typed."""
        return f"civitai:{self.version}"


@dataclass(frozen=True)
class UrlAddress:
    """A file on the web."""

    url: str

    def __str__(self) -> str:
        """Return it as it is typed, without what may be a secret: the query."""
        return self.url.partition("?")[0].partition("#")[0]


Address = HubAddress | CivitaiAddress | UrlAddress


def parse_address(text: str) -> Address | None:
    """Return the address that `text` is; None if it is a path on this machine.

    Raises:
        InputError: It begins like an address and is none.
    """
    kind, colon, rest = text.partition(":")
    if not colon:
        return None
    if kind in {"http", "https"} and rest.startswith("//"):
        return UrlAddress(text)
    if kind == "civitai":
        if not _VERSION_ID.fullmatch(rest):
            raise InputError(
                f"{text[:200]!r} is no address on Civitai; give civitai:NUMBER with the number behind "
                "`modelVersionId=` in the address of the model's page."
            )
        return CivitaiAddress(int(rest))
    if kind == "hub":
        return _hub(text, rest)
    return None


def _hub(text: str, rest: str) -> HubAddress:
    path, at, revision = rest.partition("@")
    parts = path.split("/")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    names = [part for part in parts[:2] if _PART.fullmatch(part) and ".." not in part and "--" not in part]
    unsafe = any(part in {"", ".", ".."} for part in parts[2:]) or "\\" in file or not file.isprintable()
    if len(names) < 2 or unsafe or (at and (not _REVISION.fullmatch(revision) or ".." in revision)):
        raise InputError(
            f"{text[:200]!r} is no address on the hub; give hub:OWNER/REPO, with /FILE behind it to choose one of "
            "several adapters, and @REVISION for a branch, tag or commit."
        )
    return HubAddress(repo, revision or None, str(PurePosixPath(file)) if file else None)
