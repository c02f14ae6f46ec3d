"""The text that goes beside a shared adapter: whom to credit, under which licences, and what to keep to.

Creative Commons asks for title, author, licence with its address, and a word on changes (CC-BY-4.0 section 3(a)); other
licences for a notice of their own.
"""

import re
from collections.abc import Iterable

from haori.core.records import AdapterCard
from haori.library.licences.sources import Ingredient
from haori.library.licences.verdict import LicenceVerdict, Source, effective_licence

__all__ = ["attribution_text", "licence_address", "public_card", "public_name", "public_verdict"]

_TITLES = {
    "base": "Base model",
    "data": "Training data",
    "checkpoint": "Checkpoint it was extracted from",
    "parent": "Adapter it was made from",
    "author": "This adapter",
}


def attribution_text(name: str, card: AdapterCard, ancestors: Iterable[AdapterCard] = ()) -> str:
    """Return the text as Markdown: a line of credit per source, notices, and what whoever takes it must keep to.

    Args:
        name: What the adapter is called.
        card: Its card.
        ancestors: Cards of the adapters it was made from, as for `effective_licence`.
    """
    verdict = public_verdict(card, ancestors)
    lines = [f"# What {name} was made from", ""]
    lines.extend(_credit(source) for source in verdict.sources)
    notices = dict.fromkeys(
        terms.notice for source in verdict.sources for _, terms in source.terms if terms.notice is not None
    )
    if notices:
        lines += ["", "## Notices", "", *(f"- {notice}" for notice in notices)]
    if verdict.conditions or verdict.conflicts:
        lines += ["", "## To keep to", ""]
        lines.extend(f"- {condition[0].upper()}{condition[1:]}." for condition in verdict.conditions)
        lines.extend(f"- {conflict}" for conflict in verdict.conflicts)
    return "\n".join(lines) + "\n"


def public_card(card: AdapterCard) -> AdapterCard:
    """Return a card in whose names no folder of this machine occurs: of data, of the base, of measurements."""
    base, source, made = card.base, card.base.source, card.combination
    if source.partition(":")[0] in {"folder", "gguf"}:
        source = f"{source.partition(':')[0]}:{public_name(source)}"
    return card.with_fields(
        base=base.with_fields(name=public_name(base.name), source=source),
        combination=made.with_fields(tuned=public_name(made.tuned)) if made is not None and made.tuned else made,
        data=tuple(one.with_fields(source=public_name(one.source)) for one in card.data),
        evaluations=tuple(
            one.with_fields(data=one.data.with_fields(source=public_name(one.data.source))) for one in card.evaluations
        ),
    )


def public_verdict(card: AdapterCard, ancestors: Iterable[AdapterCard] = ()) -> LicenceVerdict:
    """Return the effective licence in words that others may read: no folder of this machine is named."""
    return effective_licence(public_card(card), [public_card(each) for each in ancestors])


def licence_address(key: str) -> str | None:
    """Return where the text of a licence can be read; None for one that no list has."""
    name = key.partition(" WITH ")[0]
    if (creative := re.fullmatch(r"CC-(BY(?:-NC|-ND|-SA)*)-(\d\.\d)", name)) is not None:
        return f"https://creativecommons.org/licenses/{creative[1].lower()}/{creative[2]}/"
    if name.startswith("LicenseRef-scancode-"):
        return f"https://scancode-licensedb.aboutcode.org/{name.removeprefix('LicenseRef-scancode-')}.html"
    return None if name.startswith("LicenseRef-") else f"https://spdx.org/licenses/{name}.html"


def public_name(name: str) -> str:
    """Return the name of data or of a base as others may read it: a hub id, or a file name without its folders."""
    kind, _, place = name.partition(":")
    if kind in {"hub", "wheel", "https"}:
        return name if kind == "https" else place
    is_path = name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1 or kind in {"folder", "gguf"}
    is_path = is_path or re.search(r"/[^/]*\.[a-z]\w+$", name) is not None
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else name


def _credit(source: Source) -> str:
    one = source.ingredient
    by = f", by {one.attribution}" if one.attribution else ""
    via = f", through {one.via}" if one.via else ""
    changes = "" if one.role == "author" else _changes(one)
    return f"- {_TITLES[one.role]}: {_named(one)}{by}{via}. Licence: {_licences(source)}.{changes}"


def _named(one: Ingredient) -> str:
    place = one.source.removeprefix("hub:") if one.source is not None and one.source.startswith("hub:") else None
    return f"{one.name} (https://huggingface.co/{place})" if place is not None else one.name


def _licences(source: Source) -> str:
    if source.ingredient.licence is None and source.ingredient.permissions is None:
        return "not stated; ask before you share or sell what is made from it"
    return ", ".join(_licence(key) for key, _ in source.terms)


def _licence(key: str) -> str:
    address = licence_address(key)
    return key if address is None else f"{key} ({address})"


def _changes(one: Ingredient) -> str:
    made = {
        "base": "The adapter changes its weights when it is attached; the model itself is not part of it",
        "data": "An adapter was trained on it; the data are not part of it",
        "checkpoint": "The adapter holds part of what it changed in the base",
        "parent": "The adapter was made from it and differs from it",
    }
    return f" {made[one.role]}."
