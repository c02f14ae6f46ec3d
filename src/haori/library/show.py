"""What a terminal shows of the library: lists, cards, proofs. Text of a card is never read as rich markup."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from haori.core.hashing import short
from haori.core.records import AdapterCard, DataReference, Metric, Verification
from haori.library.client_runs import client_run_rows
from haori.library.file_facts import file_facts
from haori.library.licences.terms import permission_terms
from haori.library.licences.verdict import LicenceVerdict, Question, effective_licence
from haori.library.lineage import ancestors
from haori.library.searching.entries import proved
from haori.library.searching.search import Listed
from haori.library.signing import signed_with
from haori.library.store import StoredAdapter

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["card_table", "licence_line", "licence_table", "list_table", "verification_table"]

_NOT_ADVICE = "A reading aid, not legal advice."


def list_table(entries: Iterable[Listed]) -> "Table":
    """Return one line per name."""
    from rich.table import Column, Table
    from rich.text import Text

    titles = ("base", "method", "MB", "licence", "commercial", "proved")
    table = Table(Column("name", no_wrap=True), *(Column(title, overflow="fold") for title in titles))
    for entry, promoted in entries:
        mark = " (mounted)" if entry.mount else " (promoted)" if promoted else ""
        table.add_row(
            Text.assemble(entry.full_name, (mark, "cyan" if entry.mount else "green")),
            Text(entry.base or "unknown"),
            Text(entry.method + (f" r{entry.rank}" if entry.rank else "")),
            f"{entry.size_bytes / 1e6:.1f}",
            Text((entry.licence or "unknown").replace("LicenseRef-scancode-", "")),
            entry.commercial,
            Text("cannot be used" if entry.problem else entry.proved, style="red" if entry.problem else ""),
        )
    return table


def card_table(stored: StoredAdapter) -> "Table":
    """Return everything a person would ask about an adapter."""
    from rich.table import Column, Table
    from rich.text import Text

    card = stored.card
    verdict = effective_licence(card, before := ancestors(stored))
    table = Table("", Column(overflow="fold"), title=stored.name, show_header=False, title_justify="left")
    rows = [
        ("names", ", ".join(card.names)),
        ("promoted", _promoted(stored)),
        ("id", short(card.id)),
        ("file" if stored.mounted else "folder", str(stored.path)),
        ("base", _base(card)),
        ("method", _method(card)),
        ("made by", _combination(card)),
        ("file", f"{card.size_bytes / 1e6:.1f} MB, {card.trainable_parameters:,} parameters"),
        *file_facts(card),
        *(("data", _data(data)) for data in card.data),
        ("made from", _parents(card, before)),
        ("downloaded from", card.downloaded_from or ""),
        ("licence", card.licence or "unknown"),
        ("permissions", permission_terms(card.permissions).reason if card.permissions is not None else ""),
        ("commercial use", f"{verdict.commercial}: {' '.join(verdict.because('commercial'))}"),
        ("sharing", f"{verdict.redistribution}: {' '.join(verdict.because('redistribution'))} {_NOT_ADVICE}"),
        ("proved", proved(card.verification)),
        ("signed", _signed(stored)),
        *_run(card),
        *client_run_rows(card),
        *((f"measured {evaluation.time[:10]}", _evaluation(evaluation.metrics, evaluation.data))
          for evaluation in card.evaluations),
        ("made with", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
        ("description", card.description or ""),
        ("author's base", ", ".join(card.stated_bases)),
        ("trigger words", ", ".join(card.trigger_words)),
        ("recommended strength", "" if card.recommended_strength is None else f"{card.recommended_strength:g}"),
        *_sidecars(stored),
        ("tags", ", ".join(card.tags)),
    ]  # fmt: skip
    for key, value in rows:
        if value:
            table.add_row(key, Text(value))
    return table


def _parents(card: AdapterCard, ancestors: Iterable[AdapterCard]) -> str:
    names = {each.id: each.names[-1] for each in ancestors if each.names}
    return ", ".join(names.get(identity, f"{short(identity)} (not in the library)") for identity in card.parents)


def _combination(card: AdapterCard) -> str:
    made = card.combination
    if made is None:
        return ""
    of = " + ".join(f"{weight:g} {short(identity)}" for identity, weight in made.weights.items()) or made.tuned or ""
    kept = "" if made.energy == 1 else f"; energy kept {made.energy:.2%}, least of a module {made.energy_least:.2%}"
    return f"{made.kind}{'' if made.method == 'linear' else f' ({made.method})'} of {of}{kept}"


def licence_table(name: str, verdict: LicenceVerdict) -> "Table":
    """Return what may be done with an adapter, and for each answer what decides it."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        "", "", Column("because", overflow="fold"), title=f"{name}: {verdict.expression}", title_justify="left"
    )
    colours = {"yes": "green", "conditions": "yellow", "unknown": "yellow", "no": "bold red"}
    asked: dict[str, Question] = {"commercial use": "commercial", "sharing": "redistribution", "credit": "credit"}
    for title, question in asked.items():
        answer = getattr(verdict, question)
        table.add_row(title, Text(answer, colours.get(answer, "")), Text("\n".join(verdict.because(question))))
    if verdict.conditions:
        table.add_row("to keep to", "", Text("\n".join(verdict.conditions)))
    table.caption = f"{_NOT_ADVICE} The licences of base, data and parents are applied as if they bound the adapter."
    table.caption_justify = "left"
    return table


def licence_line(verdict: LicenceVerdict) -> str:
    """Return what may be done with an adapter, in a sentence."""
    return (
        f"Licence: {verdict.expression}; commercial use: {verdict.commercial}; sharing: {verdict.redistribution}; "
        f"credit: {verdict.credit}."
    )


def verification_table(verification: Verification) -> "Table":
    """Return the checks of a proof, one line each."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("check", "", Column("what was found", overflow="fold"))
    for check in verification.checks:
        mark = "[green]passed[/]" if check.passed else "[bold red]failed[/]"
        table.add_row(Text(check.name), mark, Text(check.detail))
    return table


def _base(card: AdapterCard) -> str:
    if not card.base.components:
        return f"{card.base.name}, by its family; added without the base itself"
    return f"{card.base.name} ({card.base.source}), fingerprint {card.base.id}"


def _promoted(stored: StoredAdapter) -> str:
    return f"{stored.name.partition('@')[0]} means this version since {stored.promoted}" if stored.promoted else ""


def _sidecars(stored: StoredAdapter) -> list[tuple[str, str]]:
    if stored.mounted is None:
        return []
    said = stored.mounted.sidecars
    return [
        ("mounted", f"{stored.mounted.mount}: read in place, not proved"),
        ("strength", "" if said.strength is None else f"{said.strength:g}"),
        ("negative prompt", said.negative_prompt),
        ("notes", said.notes),
        ("picture", said.preview or ""),
        ("beside it", " ".join(said.problems)),
    ]


def _signed(stored: StoredAdapter) -> str:
    key = signed_with(stored.path)
    return "" if key is None else f"with the key {key}, not checked here; see `haori library verify-signature`"


def _method(card: AdapterCard) -> str:
    parts = [card.method]
    if card.rank is not None:
        parts.append(f"rank {card.rank}")
    if card.alpha is not None:
        parts.append(f"alpha {card.alpha:g}")
    if card.target_modules:
        parts.append(f"on {', '.join(card.target_modules)}")
    return ", ".join(parts)


def _data(data: DataReference) -> str:
    rows = ", ".join(f"{count:,} {split}" for split, count in data.rows.items())
    return f"{data.source}: {rows} rows, {data.format}, {data.licence or 'licence unknown'}, {short(data.hash)}"


def _run(card: AdapterCard) -> list[tuple[str, str]]:
    if card.run is None:
        return []
    run = card.run
    figures = (
        f"{run.steps} steps, {run.cost:,} {run.unit}, {run.seconds:.0f} s, peak {run.peak_memory_bytes / 1e9:.2f} GB"
    )
    return [("training", figures), ("diagnosis", " ".join(run.diagnosis))]


def _evaluation(metrics: dict[str, Metric], data: DataReference) -> str:
    said = []
    for name, metric in metrics.items():
        base = f" (base {metric.base:.4g})" if metric.base is not None else ""
        said.append(f"{name.replace('_', ' ')} {metric.value:.4g}{base}")
    return f"{', '.join(said)} on {data.source}"
