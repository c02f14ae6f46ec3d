"""Adapters of the library, combined: read, blended or resized, proved, stored again; and extracted from checkpoints."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError, MismatchError
from haori.core.progress_bar import progress_bar
from haori.core.records import Combination
from haori.library.checkpoints.tensors import BaseTensors
from haori.library.combining.blending import BlendOptions, Part, blend_updates
from haori.library.combining.energy import Energy
from haori.library.combining.extracting import extract_updates
from haori.library.combining.storing import check_same_base, store_combined, with_energy
from haori.library.fit import BaseWeight, match
from haori.library.formats.registry import read_updates
from haori.library.opened import base_of
from haori.library.store import Library, StoredAdapter, check_name
from haori.library.stored_updates import read_stored, without_copies

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base

__all__ = ["Combined", "blend_stored", "extract_stored", "known_base", "read_parts", "resize_stored"]


class Combined(NamedTuple):
    """What was made and stored, what truncation kept, and a sentence on what could not be represented."""

    stored: StoredAdapter
    energy: Energy
    left_out: str = ""


def blend_stored(
    parts: Sequence[tuple[str, float]],
    name: str,
    options: BlendOptions | None = None,
    *,
    base_spec: str | None = None,
    library: Library | None = None,
) -> Combined:
    """Blend adapters of the library into a new one.

    A single adapter at weight 1 is not made anew: it gains the name. A blend has the trigger words of the parts that
    are added, in their order.

    Args:
        parts: Names with weights.
        name: Name of the blend.
        options: How; the exact sum by default.
        base_spec: Base to use instead of the one on the cards.
        library: The library; by default that of this machine.

    Raises:
        LibraryError: There is no such adapter, or the name is not allowed.
        MismatchError: The adapters were made for different bases, or cannot be blended.
        VerificationError: The blend failed its proof; nothing is stored.
    """
    options = options or BlendOptions()
    options.check()
    check_name(name)
    library = library or Library()
    parents = [library.get(spec) for spec, _ in parts]
    check_same_base(parents)
    base = known_base(parents, base_spec)
    read = read_parts(base, [(parent, weight) for parent, (_, weight) in zip(parents, parts, strict=True)])
    used = [(parent, part) for parent, part in zip(parents, read, strict=True) if part.weight != 0]
    modules = len({module for _, part in used for module in part.updates.modules})
    with progress_bar("blending", modules, "modules") as advance:
        blend = blend_updates(read, options, weight_of=_weight_of(base, read), advance=advance)
    if len(used) == 1 and blend.updates is used[0][1].updates:
        parent = used[0][0]
        return Combined(library.add(parent.path, name, parent.card), blend.energy)
    random = "dare" in options.method
    sparse = options.method != "linear"
    weights: dict[str, float] = {}
    for parent, part in used:
        weights[parent.card.id] = weights.get(parent.card.id, 0.0) + part.weight
    made = Combination(
        kind="blend", method=options.method, weights=weights, rank=options.rank,
        density=options.density if sparse else None, seed=options.seed if random else None,
    )  # fmt: skip
    kept = {parent.card.id: parent for parent, _ in used}
    # A part that is taken away is not to be called up.
    adding = [parent for parent in kept.values() if weights[parent.card.id] > 0]
    words = tuple(dict.fromkeys(word for parent in adding for word in parent.card.trigger_words))
    stored = store_combined(
        blend.updates, base, name, with_energy(made, blend.energy),
        parents=list(kept.values()), library=library, trigger_words=words,
    )  # fmt: skip
    return Combined(stored, blend.energy)


def resize_stored(
    spec: str, rank: int, name: str | None = None, *, base_spec: str | None = None, library: Library | None = None
) -> Combined:
    """Store an adapter at another rank: of each module the nearest change that has it.

    Args:
        spec: The adapter.
        rank: Most ranks of a module; modules of fewer keep theirs.
        name: Name of the result; by default the next version of its own.
        base_spec: Base to use instead of the one on the card.
        library: The library; by default that of this machine.

    Raises:
        InputError: It has no more than this rank anywhere.
        MismatchError: It cannot be represented as a LoRA.
        VerificationError: The result failed its proof; nothing is stored.
    """
    library = library or Library()
    parent = library.get(spec)
    name = check_name(name or parent.name.partition("@")[0])
    base = known_base([parent], base_spec)
    read = read_parts(base, [(parent, 1.0)])
    updates = read[0].updates
    plain = all(update.kind == "lora" and update.magnitude is None for update in updates.modules.values())
    highest = max(updates.ranks, default=0)
    if plain and highest <= rank:
        raise InputError(f"{parent.name!r} has the rank {highest} at most already; ask for a lower one than that.")
    with progress_bar("resizing", len(updates.modules), "modules") as advance:
        found = blend_updates(read, BlendOptions(rank=rank), weight_of=_weight_of(base, read), advance=advance)
    made = Combination(kind="resize", weights={parent.card.id: 1.0}, rank=rank)
    fields = {field: getattr(parent.card, field) for field in ("description", "trigger_words", "tags")}
    stored = store_combined(
        found.updates, base, name, with_energy(made, found.energy), parents=[parent], library=library, **fields
    )
    return Combined(stored, found.energy)


def extract_stored(
    base_spec: str, tuned_spec: str, rank: int, name: str, *, library: Library | None = None
) -> Combined:
    """Store what a full fine-tune did to its base as a LoRA.

    The adapter has the licence and the chat template of the tuned checkpoint.

    Args:
        base_spec: The base.
        tuned_spec: The same model, trained further: a folder, or anything else that `find_base` finds.
        rank: Most ranks of a module.
        name: Name of the adapter.
        library: The library; by default that of this machine.

    Raises:
        BaseError: One of the two is not here, or is quantised.
        MismatchError: They are different architectures, or differ in nothing that a LoRA can represent.
        VerificationError: The adapter failed its proof; nothing is stored.
    """
    from haori.bases import find_base

    check_name(name)
    base, tuned = find_base(base_spec), find_base(tuned_spec)
    with progress_bar("comparing", base.parameters, "weights") as advance:
        found = extract_updates(base, tuned, rank, advance=advance)
    made = Combination(
        kind="extract", rank=rank, tuned=f"{tuned.name} ({tuned.id})", left_out=len(found.left_out)
    )  # fmt: skip
    stored = store_combined(
        found.updates, base, name, with_energy(made, found.energy), tuned=tuned, library=library or Library()
    )
    return Combined(stored, found.energy, found.sentence())


def known_base(parents: Sequence[StoredAdapter], spec: str | None) -> "Base | None":
    """Find the base of adapters; None where nothing but its family is known and none is given.

    Raises:
        BaseError: It is not on this machine.
    """
    named = next((parent.card for parent in parents if parent.card.base.components), None)
    return base_of(named or parents[0].card, spec) if named is not None or spec is not None else None


def read_parts(base: "Base | None", parents: Sequence[tuple[StoredAdapter, float]]) -> list[Part]:
    """Read adapters with their weights, without copies of the base's own tensors that PEFT keeps beside updates."""
    if base is None:
        return [Part(parent.name, read_updates(parent.path), weight) for parent, weight in parents]
    tensors = BaseTensors(base)
    return [
        Part(parent.name, without_copies(read_stored(parent.path, base), tensors), weight) for parent, weight in parents
    ]


def _weight_of(base: "Base | None", parts: Sequence[Part]) -> "Callable[[str], Tensor] | None":
    """Return what reads the base's weight of a module, for adapters whose change depends on it."""
    if base is None:
        return None
    tensors = BaseTensors(base)

    @cache
    def places() -> dict[str, BaseWeight]:
        found: dict[str, BaseWeight] = {}
        for part in parts:
            fit = match(part.updates, tensors.weights)
            fit.require(part.name, base.name)
            found.update(fit.weights)
        return found

    def weight_of(module: str) -> "Tensor":
        weight = places()[module]
        if weight.shape is None:
            raise MismatchError(
                f"What a DoRA does to {module!r} depends on the base's weight, and {base.name!r} is quantised; give "
                "the 16-bit model it was made from with --base."
            )
        return tensors.read(module.partition(".")[0], weight)

    return weight_of
