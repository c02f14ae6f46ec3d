"""Where adapters come from: ancestors in the library, the tree, the text that credits them."""

import io

import pytest

from haori.core.records import DataReference
from haori.library import Library, ancestors, attribution_text, effective_licence, lineage_tree
from haori.library.licences.attribution import licence_address, public_name
from haori.library.licences.verdict import commercial_use
from tests.command_line import haori
from tests.library_samples import base_reference, card_of, written_adapter

HOSTILE = "[red]x[/]"


def data(source: str, licence: str | None, attribution: str | None = None) -> DataReference:
    return DataReference(source=source, hash="sha256:" + "d" * 64, format="messages", rows={"train": 7},
                         licence=licence, attribution=attribution)  # fmt: skip


@pytest.fixture
def library(tmp_path, haori_home):
    """Three generations: grand was trained on non-commercial data, parent from it, child from parent."""
    kept, parents = Library(), ()
    rows = {
        "grand": data("/home/me/private/grand.jsonl", "CC-BY-NC-4.0", "Ada L."),
        "parent": data("hub:org/set", "CC-BY-4.0", HOSTILE),
        "child": data("rows.jsonl", "MIT"),
    }
    for seed, (name, reference) in enumerate(rows.items()):
        folder = written_adapter(tmp_path / name, seed=seed)
        base = base_reference(licence="gemma")
        stored = kept.add(folder, name, card_of(folder, base, data=(reference,), parents=parents, licence="MIT"))
        parents = (stored.card.id,)
    return kept


def shown(table) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def tree_of(library, name: str) -> str:
    stored = library.get(name)
    return shown(lineage_tree(stored.name, stored.card, ancestors(stored)))


def test_every_generation_is_found_in_the_library(library):
    assert [card.names for card in ancestors(library.get("child"))] == [("parent@1",), ("grand@1",)]
    assert ancestors(library.get("grand")) == ()


def test_removed_damaged_and_strange_parents_are_left_out(library):
    child = library.get("child")
    (library.get("parent").path / "card.json").write_text("{")
    assert ancestors(child) == ()
    strange = library.update("child", parents=("sha256:../../..", "elsewhere", child.card.id))
    assert ancestors(strange) == ()
    assert effective_licence(strange.card).commercial == "unknown"


def test_the_tree_has_each_generation_below_the_next(library):
    lines = tree_of(library, "child").splitlines()
    words = ("child@1", "parent parent@1", "data hub:org/set", "parent grand@1")
    depth = {word: next(line.index(word) for line in lines if word in line) for word in words}
    assert depth["child@1"] < depth["parent parent@1"] < depth["parent grand@1"]
    assert depth["data hub:org/set"] == depth["parent grand@1"]
    library.remove("parent")
    assert "not in this library" in tree_of(library, "child")


def test_the_command_says_what_decides(capsys, library):
    done = haori(capsys, "library", "licence", "child")
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if "commercial use" in line)
    assert " no " in row
    assert "grand.jsonl" in done.out
    assert "through grand@1" in done.out
    assert "prohibited-use policy" in done.out
    listed = haori(capsys, "library", "list").out.splitlines()
    assert any("grand@1" in line and " no " in line for line in listed)
    assert any("parent@1" in line and " conditions " in line for line in listed)
    assert "commercial use" in haori(capsys, "library", "show", "child").out
    assert "parent grand@1" in haori(capsys, "library", "lineage", "child").out


def test_the_credit_has_every_source_author_licence_and_notice(capsys, library, tmp_path):
    done = haori(capsys, "library", "licence", "child", "--notice", tmp_path / "NOTICE.md")
    assert done.code == 0, done.err
    text = (tmp_path / "NOTICE.md").read_text()
    assert haori(capsys, "library", "licence", "child", "--attribution").out == text
    credits = [line for line in text.splitlines() if line.startswith(("- Base", "- Training data"))]
    assert len(credits) == 4  # the base once, and the data of each generation
    by_nc = next(line for line in credits if "CC-BY-NC-4.0" in line)
    assert "Ada L." in by_nc
    assert "https://creativecommons.org/licenses/by-nc/4.0/" in by_nc
    assert "/home/me" not in text
    assert HOSTILE in text
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in text


def test_a_source_without_licence_is_not_passed_over(library):
    bare = library.update("child", data=(data("mine.jsonl", None),), parents=())
    text = attribution_text("child@1", bare.card)
    assert "mine.jsonl. Licence: not stated; ask" in text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/me/x.jsonl", "x.jsonl"),
        ("./folder/x.jsonl", "x.jsonl"),
        ("data/x.jsonl", "x.jsonl"),
        ("C:\\data\\x.csv", "x.csv"),
        ("folder:/srv/models/base", "base"),
        ("hub:org/name", "org/name"),
        ("stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("reviews", "reviews"),
    ],
)
def test_names_for_others_have_no_folders_of_this_machine(name, public):
    assert public_name(name) == public


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("CC-BY-NC-SA-3.0", "https://creativecommons.org/licenses/by-nc-sa/3.0/"),
        ("Apache-2.0", "https://spdx.org/licenses/Apache-2.0.html"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "https://spdx.org/licenses/GPL-2.0-only.html"),
        ("LicenseRef-scancode-flux-1-nc", "https://scancode-licensedb.aboutcode.org/flux-1-nc.html"),
        ("LicenseRef-house-rules", None),
    ],
)
def test_where_licences_can_be_read(key, address):
    assert licence_address(key) == address


def test_a_list_says_what_the_card_alone_tells(library):
    child = library.get("child").card
    assert commercial_use(child) == "conditions"  # its own licence, MIT, claims nothing of its parents
    assert (
        commercial_use(child.with_fields(licence=effective_licence(child, ancestors(library.get("child"))).expression))
        == "no"
    )
    assert commercial_use(child.with_fields(licence=effective_licence(child).expression)) == "unknown"
    assert commercial_use(child.with_fields(licence=None)) == "unknown"
