"""Proves what was combined on its base and stores it, with its parents, its licence and how it was made on the card."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError, MismatchError
from haori.core.records import MODEL_COMPONENT, AdapterCard, Combination
from haori.library.attaching import check_base
from haori.library.cards import draft_card
from haori.library.combining.energy import Energy
from haori.library.families import reference_of, tell_family
from haori.library.format_export import require_alike
from haori.library.formats.bundled_words import is_bundled
from haori.library.formats.format import SINGLE_FILE, open_source
from haori.library.formats.registry import format_named, format_of
from haori.library.licences.verdict import effective_licence
from haori.library.lineage import ancestors
from haori.library.prompt_formats import joint_format, prompt_format
from haori.library.proof.logits import default_probes
from haori.library.proof.verify import require_passed, verify_adapter
from haori.library.single_file import draft_file_card, verify_file
from haori.library.stated import Stated
from haori.library.store import Library, StoredAdapter

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.data import PromptFormat
    from haori.library.updates import AdapterUpdates

__all__ = ["check_same_base", "store_combined", "with_energy"]

_FOR_IMAGES = ("kohya", "diffusers")


def check_same_base(parents: Sequence[StoredAdapter]) -> None:
    """Refuse adapters that were made for different bases, by the content of the components that they change.

    Raises:
        MismatchError: They were.
    """
    first = parents[0]
    for other in parents[1:]:
        if _is_same_family(first, other):
            continue  # of one of the two nothing else is known; shapes are compared module by module
        names = sorted({*first.card.components, *other.card.components})
        found = first.card.base.compare(other.card.base, names)
        how = next((f" ({name}: {how})" for name, how in found.items() if how != "same"), None)
        if how is not None:
            mine, its = first.card.base, other.card.base
            how = how if mine.components and its.components else ""  # of a family alone no component is known
            raise MismatchError(
                f"{first.name!r} was made for the base {mine.name!r} ({mine.id}) and {other.name!r} for "
                f"{its.name!r} ({its.id}){how}; what one adds to a weight means nothing on another, so only "
                "adapters of one base can be combined."
            )


def _is_same_family(one: StoredAdapter, other: StoredAdapter) -> bool:
    first, second = one.card.base, other.card.base
    known = first.components and second.components
    return not known and first.family == second.family not in {None, "unknown"}


def with_energy(made: Combination, energy: Energy) -> Combination:
    """Return how something was made with what truncation kept of it."""
    return made.with_fields(energy=energy.share, energy_median=energy.median, energy_least=energy.worst[1])


def store_combined(
    updates: "AdapterUpdates",
    base: "Base | None",
    name: str,
    made: Combination,
    *,
    parents: Sequence[StoredAdapter] = (),
    tuned: "Base | None" = None,
    library: Library | None = None,
    **fields: Any,
) -> StoredAdapter:
    """Prove an adapter that was made of others, or of two checkpoints, and store it.

    It is spoken to as its parents are: it keeps their chat template, and what all of them were trained with besides.

    Args:
        updates: What it changes.
        base: Its base; None for an adapter for images of whose base only the family is known.
        name: Its name in the library.
        made: How it was made.
        parents: The adapters it was made of.
        tuned: The checkpoint it was extracted from, whose chat template and licence it has.
        library: Where to; by default the library of this machine.
        fields: Any other field of the card.

    Raises:
        InputError: The parents were trained with different templates, or it cannot be represented as an adapter.
        VerificationError: It failed its proof; nothing is stored.
    """
    library = library or Library()
    for parent in parents:
        if base is not None and parent.card.base.components:
            check_base(parent.card, base.reference())
    with tempfile.TemporaryDirectory(prefix="haori-") as place:
        if base is None or updates.components != (MODEL_COMPONENT,):
            path, card = _written_file(Path(place), updates, base, parents, Stated(**fields))
        else:
            path, card = _written_folder(Path(place), updates, base, parents, tuned, fields)
        card = card.with_fields(
            origin="combined" if tuned is None else "added",
            parents=tuple(parent.card.id for parent in parents),
            combination=made,
        )
        card = card.with_fields(licence=_licence(card, parents) if tuned is None else tuned.licence)
        return library.add(path, name, card)


def _written_folder(
    place: Path,
    updates: "AdapterUpdates",
    base: "Base",
    parents: Sequence[StoredAdapter],
    tuned: "Base | None",
    fields: Mapping[str, Any],
) -> tuple[Path, AdapterCard]:
    """Write an adapter of a language model as a PEFT folder, prove it there and draft its card."""
    from haori.bases import load_tokenizer
    from haori.data import template_hash, template_of

    tokenizer = load_tokenizer(base)
    spoken = tokenizer if tuned is None else load_tokenizer(tuned)
    if formats := [prompt_format(tokenizer, parent.path, parent.card) for parent in parents]:
        spoken = joint_format(formats).tokenizer
    folder = place / "adapter"
    config = json.loads((base.components[MODEL_COMPONENT].path / "config.json").read_text(encoding="utf-8"))
    format_named("peft").write(updates, folder, base_config=config)
    if (template := template_of(spoken)) not in {None, template_of(tokenizer)}:
        (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")
    verification = verify_adapter(base, folder, probes=default_probes(tokenizer))
    require_passed(verification)
    card = draft_card(
        folder,
        base.reference(),
        origin="combined",
        verification=verification,
        template_hash=template_hash(spoken),
        recipe=_prompting(formats),
        **fields,
    )
    return folder, card


def _written_file(
    place: Path, updates: "AdapterUpdates", base: "Base | None", parents: Sequence[StoredAdapter], stated: Stated
) -> tuple[Path, AdapterCard]:
    """Write an adapter for images as one file, read it again, compare and check it, and draft its card.

    It has the format of its first parent if that can hold it, and otherwise kohya's or that of diffusers, which has no
    place for new words in one file.
    """
    path = place / SINGLE_FILE
    several = {"peft", "diffusers"} if any(is_bundled(key) for key in updates.extra) else {"peft"}
    names = dict.fromkeys(
        name for name in (*(parent.card.format for parent in parents), *_FOR_IMAGES) if name not in several
    )
    for name in names:
        try:
            format_named(name).write(updates, path)
            break
        except InputError as error:
            reason = error
    else:
        raise InputError(f"No file format for images can hold the result: {reason}")
    source = open_source(path)
    read = format_of(source).read(source)
    require_alike(updates, read, SINGLE_FILE)
    family = tell_family(read)
    verification = verify_file(read, len(source.tensors), base, family, label="result")
    require_passed(verification)
    known = [parent.card.base for parent in parents if parent.card.base.components] or [p.card.base for p in parents]
    reference = known[0] if base is None else reference_of(base, family.name)
    return path, draft_file_card(path, read, reference, verification, stated)


def _licence(card: AdapterCard, parents: Sequence[StoredAdapter]) -> str:
    known = [each for parent in parents for each in (parent.card, *ancestors(parent))]
    return effective_licence(card, known).expression


def _prompting(formats: "Sequence[PromptFormat]") -> dict[str, Any] | None:
    """Return what all parents' recipes say alike of prompts, as the part of a recipe that a card is asked for."""
    systems = {one.systems for one in formats}
    data: dict[str, Any] = {}
    if len(systems) == 1 and len(system := systems.pop()) == 1:
        data["system"] = system[0]
    if formats and all(one.control_tokens == "allow" for one in formats):
        data["control_tokens"] = "allow"
    return {"data": data} if data else None
