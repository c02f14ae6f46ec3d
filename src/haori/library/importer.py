"""Takes an adapter made elsewhere into the library: inspected, proved on its base, and only then stored."""

from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.records import AdapterCard
from haori.library.adapter_files import inspect_adapter
from haori.library.adapter_names import check_no_base_name
from haori.library.attaching import check_base
from haori.library.cards import draft_card, read_card
from haori.library.logits import default_probes
from haori.library.model_card import read_model_card
from haori.library.prompt_formats import prompt_format
from haori.library.store import Library, StoredAdapter, check_name
from haori.library.validation import validate_tensors
from haori.library.verify import require_passed, verify_adapter

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["import_adapter"]


def import_adapter(
    folder: Path,
    base: "Base",
    *,
    name: str,
    library: Library | None = None,
    licence: str | None = None,
    description: str | None = None,
    dtype: str = "auto",
) -> StoredAdapter:
    """Prove the PEFT adapter in `folder` on `base` and store it with the origin `added`.

    Args:
        folder: A folder as PEFT's save_pretrained writes it, of any PEFT method.
        base: The base it was made for.
        name: Name in the library, without version.
        library: The library to add to; by default that of this machine.
        licence: The terms its author gives it (SPDX id or expression); by default those of its model card.
        description: What it is for.
        dtype: Dtype to prove it in.

    Raises:
        FileFormatError: A file is missing, unsafe or damaged.
        MismatchError: The folder holds a card that names another base.
        VerificationError: It failed its proof on this base; nothing is stored.
        LibraryError: The name is not allowed.
    """
    from haori.bases import load_tokenizer
    from haori.data import template_hash

    check_no_base_name(check_name(name), base.name)
    validate_tensors(inspect_adapter(folder).weights)
    card: AdapterCard | None = read_card(folder)
    if card is not None:
        check_base(card, base.reference())
    tokenizer = load_tokenizer(base)
    verification = verify_adapter(base, folder, probes=default_probes(tokenizer), dtype=dtype)
    require_passed(verification)
    said = read_model_card(folder)
    drafted = draft_card(
        folder,
        base.reference(),
        origin="added",
        verification=verification,
        template_hash=template_hash(prompt_format(tokenizer, folder, None).tokenizer),
        licence=licence or said.licence,
        tags=said.tags,
        stated_bases=said.bases,
        description=description,
    )
    return (library or Library()).add(folder, name, drafted)
