"""The model card beside an adapter that is added."""

from pathlib import Path

import pytest

from haori.bases import find_base
from haori.library import Library, effective_licence, import_adapter
from haori.library.model_cards.reading import ModelCard, read_model_card
from tests.command_line import haori as haori_command
from tests.library_samples import stock_lora, written_adapter

CARD = """---
license: cc-by-nc-4.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags:
- lora
- customer support
- 7
library_name: peft
---
# Mine
license: mit
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CARD, ModelCard("CC-BY-NC-4.0", ("HuggingFaceTB/SmolLM2-135M-Instruct",), ("lora", "customer support"))),
        ("\ufeff" + CARD.replace("\n", "\r\n"), ModelCard("CC-BY-NC-4.0", ("HuggingFaceTB/SmolLM2-135M-Instruct",),
                                                          ("lora", "customer support"))),
        ("---\nlicense: [mit, apache-2.0]\nbase_model: [a, b, a]\ntags: one\n---\n",
         ModelCard("MIT AND Apache-2.0", ("a", "b"), ("one",))),
        ("---\nlicense: other\nlicense_name: my-terms\n---\n", ModelCard("LicenseRef-my-terms", (), ())),
        ("---\nlicense: other\n---\n", ModelCard(None, (), ())),
        ("# only text\nlicense: mit\n", ModelCard(None, (), ())),
        ("---\n[not, a table]\n---\n", ModelCard(None, (), ())),
        ("---\nlicense: mit\n: : :\n---\n", ModelCard(None, (), ())),
        ("---\ncreated: 2026-13-45\nlicense: mit\n---\n", ModelCard(None, (), ())),
        ("---\ntags: " + "[" * 5000 + "\n---\n", ModelCard(None, (), ())),
        ("---\na: &a [x, x]\nb: &b [*a, *a]\ntags: [*b, real]\n---\n", ModelCard(None, (), ("real",))),
    ],
)  # fmt: skip
def test_what_a_card_states(tmp_path: Path, text: str, expected: ModelCard):
    (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    assert read_model_card(tmp_path) == expected


def test_no_card_states_nothing(tmp_path: Path):
    assert read_model_card(tmp_path) == ModelCard(None, (), ())
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is hereby granted, free of charge, to any person ...")
    assert read_model_card(tmp_path).licence == "MIT"


def test_it_is_kept_and_counts_as_the_authors_terms(tiny_base_folder: Path, tmp_path: Path):
    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    (folder / "README.md").write_text(CARD)
    base = find_base(str(tiny_base_folder))
    card = import_adapter(folder, base, name="stated").card
    assert (card.licence, card.tags) == ("CC-BY-NC-4.0", ("lora", "customer support"))
    assert card.stated_bases == ("HuggingFaceTB/SmolLM2-135M-Instruct",)
    assert effective_licence(card).commercial == "no"
    assert [found.entry.full_name for found in Library().search("customer SmolLM2").listed] == ["stated@1"]
    other = stock_lora(tiny_base_folder, tmp_path / "b", seed=2)
    (other / "README.md").write_text(CARD)
    assert import_adapter(other, base, name="given", licence="MIT").card.licence == "MIT"


def test_the_command_says_what_it_read_and_what_it_left(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    (folder / "README.md").write_text(CARD)
    written_adapter(folder / "poet")
    written_adapter(folder / "checkpoint-7")
    base = str(tiny_base_folder)
    said = " ".join(haori_command(capsys, "library", "add", folder, "--base", base, "--name", "x").out.split())
    assert "Licence, as the adapter's folder states it: CC-BY-NC-4.0." in said
    assert "Not added: the adapters in its sub-folders, 'poet'." in said
    (folder / "adapter_config.json").unlink()
    refused = haori_command(capsys, "library", "add", folder, "--base", base, "--name", "y")
    assert refused.code != 0 and "1 adapter in folders of their own: 'poet'" in " ".join(refused.err.split())
