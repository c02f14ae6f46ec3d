"""Fetches a version of a model from Civitai: what its page says, its author's permissions, and the one file wanted.

Two replies are read: that of the version (files, hashes, trigger words, base), and that of its model (permissions,
tags). A token, from CIVITAI_API_TOKEN, goes to Civitai itself and not to where its files are stored.
"""

import os
from dataclasses import replace
from pathlib import Path

from haori.core.errors import DownloadError, FileFormatError
from haori.core.records import Permissions
from haori.core.settings import settings
from haori.library.exchange.addresses import CivitaiAddress
from haori.library.exchange.civitai_version import CivitaiFile, CivitaiVersion, permissions_of, read_version
from haori.library.exchange.connecting import check_url
from haori.library.exchange.download import download, fetch_json
from haori.library.exchange.fetched import Fetched
from haori.library.exchange.requesting import Limits
from haori.library.stated import Stated

__all__ = ["TOKEN_VARIABLE", "fetch_civitai"]

TOKEN_VARIABLE = "CIVITAI_API_TOKEN"  # noqa: S105
_KINDS = frozenset({"lora", "locon", "dora", "lycoris", ""})


def fetch_civitai(address: CivitaiAddress, folder: Path, limits: Limits) -> Fetched:
    """Fetch the LoRA file of a version into `folder`.

    Raises:
        DownloadError: It cannot be fetched, is no LoRA, or is not the file that Civitai states the hash of.
        FileFormatError: The version has no safetensors file, or the file is damaged.
    """
    site = settings().civitai_endpoint.rstrip("/")
    if token := os.environ.get(TOKEN_VARIABLE):
        limits = replace(limits, tokens={check_url(site, loopback=limits.loopback).origin: token})
    version = read_version(fetch_json(f"{site}/api/v1/model-versions/{address.version}", limits))
    if version.kind.casefold() not in _KINDS:
        raise DownloadError(f"'{address}' is a {version.kind} ({version.name!r}), not a LoRA; give another version.")
    file = _choose(address, version)
    permissions, tags = _of_model(site, version, limits)
    path = folder / "adapter.safetensors"
    stated = file.hashes.get("sha256")
    found = download(file.url, path, limits, sha256=stated, what=f"The file {file.name!r} of '{address}'")
    said = Stated(
        description=" - ".join(text for text in (version.name, version.description) if text) or None,
        trigger_words=version.trigger_words, tags=tags, stated_bases=(version.base,) if version.base else (),
        downloaded_from=str(address), permissions=permissions,
    )  # fmt: skip
    return Fetched(path, found, stated is not None, Path(file.name).stem, said)


def _of_model(site: str, version: CivitaiVersion, limits: Limits) -> tuple[Permissions | None, tuple[str, ...]]:
    if version.model_id is None:
        return version.permissions, version.tags
    model = fetch_json(f"{site}/api/v1/models/{version.model_id}", limits)
    tags = model.get("tags")
    said = tuple(tag.strip()[:100] for tag in tags[:100] if isinstance(tag, str)) if isinstance(tags, list) else ()
    return permissions_of(model) or version.permissions, said or version.tags


def _choose(address: CivitaiAddress, version: CivitaiVersion) -> CivitaiFile:
    usable = [file for file in version.files if file.name.lower().endswith(".safetensors") and file.url]
    models = [file for file in usable if file.kind in {"Model", "Pruned Model", ""}]
    if chosen := next((file for file in models if file.primary), models[0] if models else None):
        return chosen
    names = ", ".join(repr(file.name[:80]) for file in version.files[:5]) or "none"
    raise FileFormatError(
        f"'{address}' has no safetensors file to fetch (its files: {names}); pickles are not fetched."
    )
