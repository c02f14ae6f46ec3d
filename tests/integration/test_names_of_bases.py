"""An adapter called as its base is: none is made, and one that is there means the same to every command."""

import json
import shutil

import pytest

from haori.bases import find_base
from haori.core.errors import InputError, LibraryError
from haori.core.settings import settings
from haori.library import Library, import_adapter, merge_stored, open_adapter
from haori.serve.adapters.directory import AdapterDirectory
from haori.serve.request import BASE
from tests.command_line import haori
from tests.library_samples import card_of, stock_lora, written_adapter

CATALOGUE = "smollm2-135m-instruct"


def anything(files, adapter) -> None:
    """The check of an engine that takes everything."""


@pytest.fixture
def base(tiny_base_folder, haori_home):
    return find_base(str(tiny_base_folder))


@pytest.fixture
def old(base, tiny_base_folder, tmp_path, monkeypatch):
    """A library in which an earlier version stored an adapter under its base's name."""
    folder = stock_lora(tiny_base_folder, tmp_path / "old")
    with monkeypatch.context() as patch:
        for module in ("store", "importer"):
            patch.setattr(f"haori.library.{module}.check_no_base_name", lambda name, base_name: None)
        return import_adapter(folder, base, name=base.name, dtype="fp32")


def test_no_adapter_is_stored_under_the_name_of_a_base(base, tiny_base_folder, tmp_path, capsys):
    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    other = shutil.copytree(tiny_base_folder, tmp_path / "other")
    assert haori(capsys, "bases", "add", other, "--name", "known").code == 0
    for name in (base.name, CATALOGUE, "known"):
        with pytest.raises(LibraryError, match=f"cannot be called '{name}': a base is called so"):
            import_adapter(folder, base, name=name)
        with pytest.raises(LibraryError, match="a base is called so"):
            Library().add(folder, name, card_of(folder, base.reference()))
        done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", name)
        assert done.code == 2 and "Choose another name" in done.err
    assert Library().list() == ()


def test_no_training_begins_under_the_name_of_its_base(base, tiny_base_folder, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"film {i}", "completion": "good"}) + "\n" for i in range(12)))
    for name in (base.name, CATALOGUE):
        done = haori(capsys, "train", "--data", data, "--base", tiny_base_folder, "--name", name)
        assert done.code == 2 and "a base is called so" in done.err
    assert not list(settings().runs.glob("*"))


def test_no_name_is_given_that_is_a_bases_or_says_more_than_a_name(base, tmp_path):
    folder = written_adapter(tmp_path / "root" / "poet")
    names = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=[folder.parent])
    for name in (base.name, CATALOGUE):
        with pytest.raises(InputError, match=r"name of the base|a base is called so"):
            names.register(name, "poet", anything)
    for name in ("poet:0.5", "a+b", "poet@1", "poet@", "a:1+b:2", "sha256:abcdef01", "-1", "a b", "@1", ":2"):
        with pytest.raises(InputError, match="cannot be called"):
            names.register(name, "poet", anything)
        with pytest.raises(LibraryError, match="cannot be called"):
            Library().add(folder, name, card_of(folder))
    names.register("poet", "poet", anything)


def test_commands_and_server_agree_on_one_that_is_there(base, old, tmp_path, capsys):
    full = f"{base.name}@1"
    assert old.name == full
    names = AdapterDirectory(Library(), base.reference(), base_names=[base.name])
    assert names.resolve(base.name).mix == BASE
    assert names.resolve(full).mix == ((old.card.id, 1.0),)
    assert names.hidden() == (base.name,)
    assert [entry.id for entry in names.entries()] == [base.name, full]
    asked = f"ask for the adapter with its version, '{full}'"
    for refused in (
        lambda: open_adapter(base.name), lambda: Library().get(base.name),
        lambda: merge_stored(base.name, tmp_path / "merged"),
    ):  # fmt: skip
        with pytest.raises(LibraryError, match=asked):
            refused()
    for command in (
        ("generate-text", base.name, "--prompt", "a"), ("chat", base.name), ("library", "show", base.name),
        ("library", "verify", base.name), ("library", "export", base.name, "--out", tmp_path / "out"),
        ("merge", base.name, "--out", tmp_path / "out"),
    ):  # fmt: skip
        done = haori(capsys, *command)
        assert done.code == 2 and full in done.err, command
    assert open_adapter(full, dtype="fp32").adapter.card.id == old.card.id
    # The way out that the guide gives: the same content under another name.
    assert import_adapter(old.path, base, name="poet", dtype="fp32").name == "poet@1"
    assert Library().remove(full) == (full,)
    assert names.resolve("poet").mix == ((old.card.id, 1.0),) and names.hidden() == ()


def test_a_base_that_was_given_an_adapters_name_later(base, tiny_base_folder, tmp_path):
    """The card names another base; the one that is asked for is called as the adapter is."""
    import_adapter(stock_lora(tiny_base_folder, tmp_path / "a"), base, name="poet", dtype="fp32")
    renamed = shutil.copytree(tiny_base_folder, tmp_path / "poet")
    with pytest.raises(LibraryError, match="ask for the adapter with its version, 'poet@1'"):
        open_adapter("poet", base_spec=str(renamed))
    assert open_adapter("poet@1", base_spec=str(renamed), dtype="fp32")
    assert open_adapter("poet", dtype="fp32")


def test_it_is_removed_and_rolled_back_with_its_version_only(base, old, capsys):
    for words in (("remove", base.name), ("rollback", base.name)):
        done = haori(capsys, "library", *words)
        assert done.code == 2
        assert f"'{base.name}@1'" in done.err
    assert [adapter.name for adapter in Library().list()] == [f"{base.name}@1"]
    assert haori(capsys, "library", "remove", f"{base.name}@1").code == 0
    assert not Library().list()
