"""Whether an adapter can be used with a base: by content first, then module by module.

`yes` is said only of the weights that it was made on, by their fingerprints. Otherwise names and shapes decide, from
the headers of the base's files: where every module has its place the answer is `structure only`: it
can be attached, and what it then does is not what was measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from haori.core.errors import FileFormatError
from haori.core.records import AdapterCard, BaseReference, Difference
from haori.library.fit import BaseWeight, Misfit, base_weights, match
from haori.library.formats.registry import read_updates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from haori.bases.base import Base
    from haori.library.store import StoredAdapter
    from haori.library.updates import AdapterUpdates

__all__ = ["Compatibility", "CompatibilityAnswer", "check_compatibility", "compatibility_table"]

CompatibilityAnswer = Literal["yes", "structure only", "no", "unknown"]

_NAMED = 8  # misfits that are listed one by one


@dataclass(frozen=True)
class Compatibility:
    """How an adapter fits a base.

    Attributes:
        adapter: Name of the adapter.
        base: Name of the base.
        answer: `unknown` only where the base, or an adapter of an unknown base, cannot be read.
        reasons: A sentence each, the decisive ones first.
        misfits: Every module of the adapter that has no place in the base, with both shapes.
    """

    adapter: str
    base: str
    answer: CompatibilityAnswer
    reasons: tuple[str, ...]
    misfits: tuple[Misfit, ...] = ()


def check_compatibility(stored: "StoredAdapter", base: "Base") -> Compatibility:
    """Say whether a stored adapter can be used with a base.

    Args:
        stored: The adapter.
        base: Any base on this machine.

    Raises:
        FileFormatError: A file of the base or of the adapter is damaged.
    """
    card, reference = stored.card, base.reference()
    names = card.components if card.base.components else ()
    found = card.base.compare(reference, names)
    content = tuple(_difference(card, reference, name, how) for name, how in found.items())
    if found and set(found.values()) == {"same"}:
        return Compatibility(stored.name, base.name, "yes", content)
    if found and set(found.values()) <= {"same", "other weights"}:
        return Compatibility(stored.name, base.name, "structure only", content)
    if not found:
        content = (f"Of the base it was made for only the family is known ({card.base.family}), not the weights.",)
    try:
        updates = read_updates(stored.path)
    except FileFormatError as error:
        answer: CompatibilityAnswer = "no" if found else "unknown"
        return Compatibility(stored.name, base.name, answer, (*content, f"Its modules cannot be compared: {error}"))
    fit = match(updates, weights := base_weights(base))
    misfits = (*fit.misfits, *_misfits_of_whole(updates, weights))
    total = len(updates.modules) + len(updates.extra)
    if misfits or not total:
        said = f"{len({misfit.module for misfit in misfits}):,} of the {total:,} modules that it changes do not fit."
        return Compatibility(stored.name, base.name, "no", (*content, said), misfits)
    fits = f"All {total:,} modules that it changes are there, in the same shapes."
    unchecked = len(fit.unchecked)
    more = (f"Of {unchecked:,} modules the shape is not known, since the base is quantised.",) if unchecked else ()
    return Compatibility(stored.name, base.name, "structure only", (*content, fits, *more))


def compatibility_table(found: "tuple[Compatibility, ...]") -> "Table":
    """Return one line per adapter and base, with the reasons and the first modules that do not fit."""
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"yes": "green", "structure only": "yellow", "unknown": "yellow", "no": "bold red"}
    table = Table("adapter", "base", Column("fits", no_wrap=True), Column("because", overflow="fold"))
    for one in found:
        named = [str(misfit) for misfit in one.misfits[:_NAMED]]
        more = [f"and {len(one.misfits) - _NAMED:,} more"] if len(one.misfits) > _NAMED else []
        why = "\n".join((*one.reasons, *named, *more))
        table.add_row(Text(one.adapter), Text(one.base), Text(one.answer, colours[one.answer]), Text(why))
    return table


def _difference(card: AdapterCard, other: BaseReference, name: str, how: Difference) -> str:
    mine, its = card.base.components.get(name), other.components.get(name)
    if its is None:
        return f"It changes the component {name!r}, which this base does not have."
    made_on = f"{card.base.name} ({mine.id})" if mine is not None else card.base.name
    if how == "same":
        return f"The weights of {name!r} are those it was made on ({its.id})."
    what = "other weights of the same structure" if how == "other weights" else "another structure"
    return f"It was made on {made_on}, and {name!r} of this base ({its.id}) has {what}."


def _misfits_of_whole(updates: "AdapterUpdates", weights: "Mapping[str, Mapping[str, BaseWeight]]") -> "list[Misfit]":
    """Return the tensors that replace one of the base's and have another shape; new ones, such as a head's, fit."""
    found = []
    for name, tensor in updates.extra.items():
        component, _, path = name.partition(".")
        weight = weights.get(component, {}).get(path)
        shape = tuple(tensor.shape)
        if weight is not None and weight.shape is not None and weight.shape != shape:
            reason = f"it replaces a tensor of {list(weight.shape)} by one of {list(shape)}"
            found.append(Misfit(name, shape, weight.shape, reason))
    return found
