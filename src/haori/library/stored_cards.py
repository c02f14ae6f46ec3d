"""Reads every card under the library's folder and checks that its files are those it describes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from haori.core.errors import HaoriError
from haori.core.records import AdapterCard
from haori.library.cards import CARD_NAME, read_card
from haori.library.contents import describes

__all__ = ["checked_cards", "stored_folder"]


def stored_folder(root: Path, adapter: str) -> Path:
    """Return where the adapter of this content id is kept under the library's folder, whether it is there or not."""
    digits = adapter.removeprefix("sha256:")
    return root / "adapters" / digits[:2] / digits


def checked_cards(root: Path) -> tuple[Sequence[AdapterCard], Sequence[str]]:
    """Return the cards that can be used, and a sentence for each folder that is left out."""
    cards: dict[str, AdapterCard] = {}
    problems: list[str] = []
    taken: dict[str, str] = {}
    for folder in _folders(root):
        try:
            card = read_card(folder)
            is_of_files = card is not None and describes(card, folder)
        except (HaoriError, OSError) as error:
            problems.append(str(error))
            continue
        clash = next((full for full in card.names if full in taken), None) if card is not None else None
        if card is None:
            problems.append(f"{str(folder)!r} holds no {CARD_NAME}.")
        elif not is_of_files or folder != stored_folder(root, card.id):
            problems.append(f"The files in {str(folder)!r} are not those its card describes: they were changed.")
        elif clash is not None:
            problems.append(f"{str(folder)!r} is called {clash!r}, as is {taken[clash]!r}; remove one of them.")
        else:
            taken.update(dict.fromkeys(card.names, str(folder)))
            cards[card.id] = card
    return list(cards.values()), problems


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders of adapters; names with a dot are unfinished or discarded."""
    for folder in sorted(root.glob("adapters/[0-9a-f][0-9a-f]/*")):
        if not folder.name.startswith(".") and folder.is_dir():
            yield folder
