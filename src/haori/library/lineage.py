"""Where an adapter comes from: its base, data, recipe and run, and the same of every adapter it was made from."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import LibraryError
from haori.core.hashing import hash_data, short
from haori.core.records import AdapterCard, BaseReference, DataReference, Evaluation
from haori.library.cards import read_card
from haori.library.client_runs import client_run_line
from haori.library.stored_cards import stored_folder

if TYPE_CHECKING:
    from rich.tree import Tree

    from haori.library.store import StoredAdapter

__all__ = ["ancestors", "lineage_tree"]

_IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")
_MADE = {"blend": "blended", "resize": "resized", "extract": "extracted"}


def ancestors(stored: "StoredAdapter") -> tuple[AdapterCard, ...]:
    """Return the cards of the adapters that an adapter was made from, and of those these were made from.

    Those that are no longer in its library, or whose card cannot be read, are left out: of them only the id is known.
    """
    root = stored.path.parent.parent.parent
    found: dict[str, AdapterCard] = {}
    waiting = list(stored.card.parents)
    while waiting:
        identity = waiting.pop()
        if identity in found or identity == stored.card.id or not _IDENTITY.fullmatch(identity):
            continue
        if (card := _card(root, identity)) is not None:
            found[identity] = card
            waiting.extend(card.parents)
    return tuple(found.values())


def lineage_tree(name: str, card: AdapterCard, ancestors: Iterable[AdapterCard]) -> "Tree":
    """Return the lineage as a tree: what each adapter was made from hangs below it.

    Args:
        name: What the adapter is called.
        card: Its card.
        ancestors: Cards of those it was made from, as `ancestors` finds them.
    """
    from rich.text import Text
    from rich.tree import Tree

    known = {each.id: each for each in ancestors}
    tree = Tree(Text(_title(card, name)))
    _grow(tree, card, known, {card.id})
    return tree


def _card(root: Path, identity: str) -> AdapterCard | None:
    try:
        return read_card(stored_folder(root, identity))
    except LibraryError:
        return None


def _grow(tree: "Tree", card: AdapterCard, known: dict[str, AdapterCard], above: set[str]) -> None:
    from rich.text import Text

    for line in _facts(card):
        tree.add(Text(line))
    for identity in card.parents:
        parent = known.get(identity)
        if identity in above:
            tree.add(Text(f"parent {short(identity)}: shown above"))
        elif parent is None:
            tree.add(Text(f"parent {short(identity)}: not in this library"))
        else:
            name = parent.names[-1] if parent.names else short(parent.id)
            branch = tree.add(Text(f"parent {_title(parent, name)}"))
            _grow(branch, parent, known, above | {identity})


def _title(card: AdapterCard, name: str) -> str:
    method = card.method + (f" rank {card.rank}" if card.rank is not None else "")
    how = card.origin if card.combination is None else _MADE[card.combination.kind]
    return f"{name}: {method}, {how} {card.created[:10]}, id {short(card.id)}"


def _facts(card: AdapterCard) -> Iterator[str]:
    yield f"base {_base(card.base)}"
    for data in card.data:
        yield f"data {_data(data)}"
    if card.downloaded_from is not None:
        yield f"downloaded from {card.downloaded_from}"
    if card.recipe_data is not None:
        yield f"recipe {card.method_kind or card.method}, {short(hash_data(card.recipe_data))}"
    if card.run is not None:
        run = card.run
        ended = f", best step {run.best_step}" if run.best_step is not None else ""
        yield f"run {run.name}: {run.started}, {run.steps:,} steps in {run.seconds:,.0f} s{ended}"
    for one in card.client_runs:
        yield f"trained by {client_run_line(one)}"
    if card.versions:
        yield f"made with {', '.join(f'{name} {version}' for name, version in card.versions.items())}"
    if len(card.names) > 1:
        yield f"also called {', '.join(card.names)}"
    if card.verification is not None:
        passed = "passed" if card.verification.passed else "failed"
        yield f"proof {passed}: {len(card.verification.checks)} checks in {card.verification.dtype}"
    for evaluation in card.evaluations:
        yield f"measured {_measured(evaluation)}"


def _base(base: BaseReference) -> str:
    revision = f" at {base.revision[:12]}" if base.revision else ""
    parts = ", ".join(f"{name} {of.id}" for name, of in base.components.items()) or f"family {base.family}"
    return f"{base.name} ({base.source}{revision}): {parts}, {base.licence or 'licence unknown'}"


def _data(data: DataReference) -> str:
    rows = ", ".join(f"{count:,} {split}" for split, count in data.rows.items())
    return f"{data.source}: {rows} rows, {short(data.hash)}, {data.licence or 'licence unknown'}"


def _measured(evaluation: Evaluation) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {one.value:.4g}" for name, one in evaluation.metrics.items())
    return f"{evaluation.time[:10]} on {evaluation.data.source}: {figures}"
