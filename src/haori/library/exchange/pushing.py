"""Uploads a stored adapter to the hub: exported and proved as always, with its model card, as one commit."""

import tempfile
from pathlib import Path

from haori.core.errors import InputError
from haori.core.records import MODEL_COMPONENT
from haori.library.exchange.addresses import HubAddress, parse_address
from haori.library.exchange.hub import push_to_hub
from haori.library.exporting import export_stored
from haori.library.format_folders import export_in_format
from haori.library.store import Library, StoredAdapter

__all__ = ["push_stored"]


def push_stored(
    name: str, address: str, *, private: bool = False, base_spec: str | None = None, library: Library | None = None
) -> str:
    """Upload an adapter of the library and return the address of the commit.

    Args:
        name: `support`, `support@2` or the first digits of an id.
        address: `hub:OWNER/REPO`.
        private: Make the repository private.
        base_spec: The base to prove the export on; by default the one on the card.
        library: The library; by default the one of this machine.

    Raises:
        InputError: The address is none of a repository.
        LibraryError: There is no such adapter.
        VerificationError: What was to be uploaded does not do what is stored.
        DownloadError: The hub refuses it, or cannot be reached.
    """
    target = parse_address(address)
    if not isinstance(target, HubAddress) or target.file is not None or target.revision is not None:
        raise InputError(f"An adapter is uploaded to hub:OWNER/REPO, and {address[:200]!r} is no such address.")
    stored = (library or Library()).get(name)
    if stored.mounted is not None:
        raise InputError(f"{stored.name!r} is a file of a mounted folder and was never proved; add it first.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        if (wanted := _format(stored)) == "peft":
            export_stored(stored.name, folder, base_spec=base_spec, library=library)
        else:
            export_in_format(stored.name, folder, wanted, base_spec=base_spec, library=library)
        return push_to_hub(folder, target.repo, private=private, message=f"Upload {stored.name} with Haori")


def _format(stored: StoredAdapter) -> str:
    """Return the format that users of the hub expect: diffusers for a pipeline, else the one it is kept in."""
    card = stored.card
    is_plain = card.format == "peft" and card.method == "lora" and card.components != (MODEL_COMPONENT,)
    return "diffusers" if is_plain else card.format
