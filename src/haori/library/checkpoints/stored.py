"""A stored adapter merged into its base on disk, and when that is the way to merge it."""

from pathlib import Path
from typing import TYPE_CHECKING

from haori.library.attaching import check_base
from haori.library.checkpoints.merging import merge_checkpoint
from haori.library.checkpoints.tensors import BaseTensors
from haori.library.merge import Merged
from haori.library.prompt_formats import stored_template
from haori.library.store import StoredAdapter
from haori.library.stored_updates import read_stored, without_copies

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["merge_on_disk", "needs_disk"]

# Proving a merge in memory takes the weights, one part of them in float64, and what is written read back.
_COPIES = 3


def needs_disk(base: "Base") -> bool:
    """Say whether a base is one of images, or a model that does not fit in the memory that is free."""
    free = _free_bytes()
    return base.pipeline is not None or (free is not None and _COPIES * base.size_bytes > free)


def merge_on_disk(stored: StoredAdapter, base: "Base", out: Path, *, allow_different_weights: bool = False) -> Merged:
    """Merge a stored adapter into its base, tensor by tensor; otherwise as `merge_checkpoint`.

    Raises:
        MismatchError: The adapter was made for another base.
    """
    if stored.card.base.components:  # of an image LoRA often only the family is known: then shapes decide
        check_base(stored.card, base.reference(), allow_different_weights=allow_different_weights)
    updates = without_copies(read_stored(stored.path, base), BaseTensors(base))
    return merge_checkpoint(
        base, updates, out, adapter=stored.name, card=stored.card, chat_template=stored_template(stored.path)
    )


def _free_bytes() -> int | None:
    """Return the memory that programs can have without swapping, where the system says so."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
