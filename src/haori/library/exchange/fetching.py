"""Fetches an adapter by its address, whatever the site: the one way from an address to files on this machine."""

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from haori.core.errors import DownloadError
from haori.core.lock import file_lock
from haori.core.settings import settings
from haori.library.exchange.addresses import Address, CivitaiAddress, HubAddress, UrlAddress
from haori.library.exchange.civitai import fetch_civitai
from haori.library.exchange.download import download
from haori.library.exchange.fetched import Fetched
from haori.library.exchange.hub import fetch_from_hub
from haori.library.exchange.requesting import Limits
from haori.library.stated import Stated

__all__ = ["fetch"]

_WAIT_S = 24 * 3600.0


def fetch(address: Address, *, allow_url: bool = False) -> Fetched:
    """Fetch an adapter; what an earlier try left half-done is gone on with.

    Args:
        address: From `parse_address`.
        allow_url: Fetch from any https URL, too; by default the setting HAORI_ALLOW_URLS says so.

    Raises:
        DownloadError: It is not allowed, cannot be fetched, or is not what its site states.
        FileFormatError: What is there is no adapter.
        InputError: The URL is not one that may be fetched.
        StorageError: The disk is full or not writable.
    """
    set_up = settings()
    limits = Limits(size_bytes=int(set_up.download_limit_gb * 1e9), loopback=set_up.download_from_loopback)
    if isinstance(address, HubAddress):
        return fetch_from_hub(address, limits)
    if set_up.offline:
        raise DownloadError(f"'{address}' needs the network, and HAORI_OFFLINE is set; unset it.")
    if isinstance(address, UrlAddress) and not (allow_url or set_up.allow_urls):
        raise DownloadError(
            f"Nothing is fetched from a plain URL such as '{address}' unless that is allowed: add --allow-url, or set "
            "HAORI_ALLOW_URLS=true. hub:OWNER/REPO and civitai:VERSION_ID are always allowed."
        )
    place = address.url if isinstance(address, UrlAddress) else str(address)
    folder = set_up.cache / "downloads" / hashlib.sha256(place.encode()).hexdigest()[:24]
    with file_lock(folder / ".lock", holds="download", timeout_s=_WAIT_S):
        if isinstance(address, CivitaiAddress):
            return _taken(fetch_civitai(address, folder, limits))
        return _taken(_fetch_url(address, folder, limits))


def _taken(fetched: Fetched) -> Fetched:
    """Move the file to a folder of its own, where no other download of the same address writes."""
    own = Path(tempfile.mkdtemp(dir=fetched.path.parent, prefix="whole-"))
    return replace(fetched, path=fetched.path.replace(own / fetched.path.name), kept_in=own)


def _fetch_url(address: UrlAddress, folder: Path, limits: Limits) -> Fetched:
    path = folder / "adapter.safetensors"
    found = download(address.url, path, limits)
    called = Path(unquote(urlsplit(address.url).path)).stem or "adapter"
    return Fetched(path, found, is_checked=False, called=called, said=Stated(downloaded_from=str(address)))
