"""What the terminal shows of the library is what the card says, brackets included."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from haori.core.records import (
    AdapterCard,
    BaseReference,
    Check,
    DataReference,
    Evaluation,
    Fingerprint,
    Metric,
    Verification,
)
from haori.library.searching.entries import entries_of
from haori.library.searching.search import Listed
from haori.library.show import card_table, list_table, verification_table
from haori.library.store import StoredAdapter

ODD = "[red]a[/b] [x]"


def shown(table) -> str:
    console = Console(file=StringIO(), width=400, color_system=None)
    console.print(table)
    return console.file.getvalue()


def stored() -> StoredAdapter:
    data = DataReference(source=f"{ODD}.jsonl", hash="sha256:0", format="messages", rows={"test": 3})
    fingerprint = Fingerprint(architecture="LlamaForCausalLM", structure="sha256:1", weights="sha256:2")
    card = AdapterCard(
        id="sha256:3", origin="added", created="now", method="lora", licence=f"own {ODD}", description=ODD,
        base=BaseReference(name=ODD, source="folder", fingerprint=fingerprint, licence=None),
        evaluations=(Evaluation(data=data, metrics={"recall[good]": Metric(value=0.25)}, time="2026-11-21T10:00"),),
    )  # fmt: skip
    return StoredAdapter(Path("adapter"), card, "mood@1", promoted="today")


def listed() -> Listed:
    card = stored().card
    (entry,) = entries_of(card.with_fields(names=("mood@1",)))
    return Listed(entry, promoted=True)


def test_text_of_a_card_is_never_markup() -> None:
    card, names = shown(card_table(stored())), shown(list_table([listed()]))
    assert f"recall[good] 0.25 on {ODD}.jsonl" in card
    assert card.count(ODD) >= 4 and f"own {ODD}" in names
    assert "mood@1 (promoted)" in names


def test_text_of_a_check_is_never_markup() -> None:
    check = Check(name="reload", passed=False, detail=f"{ODD} differs")
    table = shown(verification_table(Verification(passed=False, checks=(check,), dtype="fp32", time="now")))
    assert f"{ODD} differs" in table and "failed" in table and "[bold" not in table
