import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import FileFormatError, HaoriError, InputError, LibraryError, MismatchError, StorageError
from haori.library import Library, adapter_id, inspect_adapter
from haori.serve.adapters.blend import parse_blend
from haori.serve.adapters.directory import AdapterDirectory
from haori.serve.request import BASE
from tests.library_samples import base_reference, card_of, written_adapter

NAMES = ("org/tiny", "tiny")


@pytest.fixture
def library(haori_home) -> Library:
    return Library()


@pytest.fixture
def roots(tmp_path) -> Path:
    root = tmp_path / "adapters"
    root.mkdir()
    return root


def any_adapter(files, adapter) -> None:
    """The check of an engine that takes everything."""


def put(library: Library, tmp_path: Path, name: str, seed: int, **fields):
    folder = tmp_path / f"made-{seed}"
    if not folder.exists():
        written_adapter(folder, seed=seed)
    return library.add(folder, name, card_of(folder, **fields))


def directory(library: Library, *roots: Path, base=None) -> AdapterDirectory:
    return AdapterDirectory(library, base or base_reference(), base_names=NAMES, roots=roots)


def ids(names: AdapterDirectory) -> list[str]:
    return [entry.id for entry in names.entries()]


def test_the_base_answers_to_its_names(library):
    names = directory(library)
    for name in NAMES:
        resolved = names.resolve(name)
        assert (resolved.mix, resolved.label, resolved.names) == (BASE, "org/tiny", ("org/tiny",))
    assert [(entry.id, entry.parent, entry.adapter) for entry in names.entries()] == [
        ("org/tiny", None, None),
        ("tiny", None, None),
    ]


def test_names_versions_and_ids(library, tmp_path):
    first, second = (put(library, tmp_path, "support", seed) for seed in (1, 2))
    names = directory(library)
    digits = first.card.id.removeprefix("sha256:")
    for spec, card, label in (
        ("support", second.card, "support@2"),
        ("support@1", first.card, "support@1"),
        (digits[:8], first.card, "support@1"),
        (first.card.id, first.card, "support@1"),
        (f"{first.card.id}:1", first.card, "support@1"),
    ):
        resolved = names.resolve(spec)
        assert (resolved.mix, resolved.label, resolved.names) == (((card.id, 1.0),), label, ("support",))


def test_entries_say_where_and_what(library, tmp_path):
    first, second = (put(library, tmp_path, "support", seed) for seed in (1, 2))
    put(library, tmp_path, "foreign", 3, base=base_reference("other", weights="other"))
    library.promote("support@1")
    names = directory(library)
    entries = {entry.id: entry for entry in names.entries()}
    assert list(entries) == ["org/tiny", "tiny", "support", "support@1", "support@2"]
    assert entries["support"].adapter == first.card.id
    assert (entries["support@2"].root, entries["support@2"].parent) == (second.path, "org/tiny")
    assert abs(entries["support@2"].created_unix_s - time.time()) < 60
    assert names.folder(second.card.id) == second.path
    assert adapter_id(names.files(second.card.id)) == second.card.id


def test_blends(library, tmp_path):
    a, b = put(library, tmp_path, "a", 1).card.id, put(library, tmp_path, "b", 2).card.id
    put(library, tmp_path, "same", 1)
    names = directory(library)

    def mix(model: str):
        return dict(names.resolve(model).mix)

    assert mix("a:0.4+b:0.6") == {a: 0.4, b: 0.6}
    assert names.resolve("a:0.4+b:0.6").mix == names.resolve("b:0.6+a:0.4").mix
    assert names.resolve("b@1:0.5+a").label == "b@1:0.5+a@1:1"
    assert mix("a:-2") == {a: -2.0}
    assert mix("a:1e1") == {a: 10.0}
    assert mix("a:0.25+a@1:0.5+same:.25") == {a: 1.0}
    assert names.resolve("a:0.5+same:0.5").label == "a@1"
    assert mix("a:0+b") == {b: 1.0}
    assert names.resolve("a:0+b:0").mix == BASE
    assert names.resolve("a:1+a:-1").label == "org/tiny"
    assert names.resolve("a+b:0").names == ("a", "b")


@pytest.mark.parametrize(
    "model",
    ["", "+", "a+", "+a", "a++b", "a:", "a:x", "a:0.4:2", "a b", "../a", "a/b", "a:nan", "a:inf", "a@x", "a@1@2", "é",
     "a\n", "a:0x1", "a:1_0", "a:--1", "x" * 5000],
)  # fmt: skip
def test_bad_syntax(library, tmp_path, model):
    put(library, tmp_path, "a", 1)
    with pytest.raises(InputError, match="is no model name") as caught:
        directory(library).resolve(model)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ("a:10.5", InputError, "between -10 and 10"),
        ("a:1e999", InputError, "between -10 and 10"),
        ("a:6+a:6", InputError, "strength 12 of 'a'"),
        ("+".join(["a:0.1"] * 9), InputError, "has 9 parts; at most 8"),
        ("a:0.5+tiny:0.5", InputError, "'tiny' is part of every blend"),
        ("aa", LibraryError, "did you mean 'a'"),
        ("a@7", LibraryError, "no version '7'"),
        ("a+nobody", LibraryError, "no adapter 'nobody'"),
        ("foreign", MismatchError, "made for 'other'.*'tiny'"),
        ("a+foreign@1:0.1", MismatchError, "made for 'other'"),
    ],
)
def test_refusals(library, tmp_path, model, error, said):
    put(library, tmp_path, "a", 1)
    put(library, tmp_path, "foreign", 2, base=base_reference("other", structure="other"))
    with pytest.raises(error, match=said):
        directory(library).resolve(model)


@given(st.text(max_size=40) | st.from_regex(r"[ab@:+.0-9eE-]{0,20}", fullmatch=True))
def test_any_text_is_a_blend_or_refused(model):
    try:
        parts = parse_blend(model)
    except InputError:
        return
    assert 1 <= len(parts) <= 8
    assert parse_blend("+".join(f"{part.spec}:{part.strength!r}" for part in parts)) == parts


def test_changes_count_from_the_next_request(library, tmp_path):
    names = directory(library)
    with pytest.raises(LibraryError, match="it is empty"):
        names.resolve("support")
    other = Library()
    first = put(other, tmp_path, "support", 1)
    assert names.resolve("support").mix == ((first.card.id, 1.0),)
    second = put(other, tmp_path, "support", 2)
    assert names.resolve("support").mix == ((second.card.id, 1.0),)
    other.promote("support@1")
    assert names.resolve("support").label == "support@1"
    third = put(other, tmp_path, "support", 3)
    assert (names.resolve("support").label, names.resolve("support@3").mix) == ("support@1", ((third.card.id, 1.0),))
    other.rollback("support")
    assert names.resolve("support").label == "support@2"
    other.remove("support@2")
    assert names.resolve("support").label == "support@3"
    with pytest.raises(LibraryError, match="not here"):
        names.files(second.card.id)
    assert ids(names) == ["org/tiny", "tiny", "support", "support@1", "support@3"]


def test_no_change_is_missed_once_files_have_rested(library, tmp_path):
    names = directory(library)
    put(library, tmp_path, "support", 1)
    names.resolve("support")
    for seed in range(2, 6):
        time.sleep(0.12)
        names.resolve("support")  # from what was read before
        other = put(Library(), tmp_path, "support", seed)
        assert names.resolve("support").mix == ((other.card.id, 1.0),)


def test_a_resting_library_is_not_read_again(library, tmp_path):
    put(library, tmp_path, "support", 1)
    names = directory(library)
    names.resolve("support")
    time.sleep(0.15)
    seen = [id(names._view()) for _ in range(2)]
    assert seen[0] == seen[1]


@pytest.mark.alone
def test_a_change_under_way_is_not_waited_for(library, tmp_path):
    put(library, tmp_path, "support", 1)
    names = directory(library)
    names.resolve("support")
    with library._change():
        began = time.perf_counter()
        assert names.resolve("support").label == "support@1"
        assert time.perf_counter() - began < 1


def test_a_killed_change_is_mended_in_the_background(library, tmp_path):
    put(library, tmp_path, "support", 1)
    names = directory(library)
    names.resolve("support")
    stored = put(library, tmp_path, "late", 2)
    library._index.put(stored.card.with_fields(names=()))  # as if killed between the folder and the index
    library.mark.touch()
    with pytest.raises(LibraryError):
        names.resolve("late")
    os.utime(library.mark, (time.time() - 60, time.time() - 60))
    for _ in range(100):
        try:
            assert names.resolve("late").mix == ((stored.card.id, 1.0),)
            break
        except LibraryError:
            time.sleep(0.05)
    else:
        pytest.fail("it was not mended")
    assert not library.mark.exists()


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_library_that_cannot_be_written_to_is_served(disk, tmp_path, haori_home, indexed):
    library = Library(disk / "library")
    put(library, tmp_path, "support", 1)
    if not indexed:
        (library.root / "index.sqlite").unlink()
    assert (library.root / "index.sqlite").exists() is indexed
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    names = directory(Library(disk / "library"))
    for _ in range(3):
        assert names.resolve("support").label == "support@1"
        time.sleep(0.06)
    names.resolve("support")
    assert names._view() is names._view()


def test_a_registered_folder(library, tmp_path, roots):
    folder = written_adapter(roots / "poet", seed=9)
    names = directory(library, roots)
    names.register("poet", folder, any_adapter)
    identity = adapter_id(inspect_adapter(folder))
    resolved = names.resolve("poet:0.5")
    assert (resolved.mix, resolved.label, resolved.names) == (((identity, 0.5),), "poet:0.5", ("poet",))
    entry = names.entries()[-1]
    assert (entry.id, entry.root, entry.adapter, entry.parent) == ("poet", folder, identity, "org/tiny")
    assert names.files(identity).folder == folder
    names.unregister("poet")
    with pytest.raises(LibraryError, match="it is empty"):
        names.resolve("poet")
    with pytest.raises(LibraryError, match="No adapter is registered as 'poet'"):
        names.unregister("poet")


def test_registering_from_the_library_pins_the_content(library, tmp_path):
    first = put(library, tmp_path, "support", 1)
    names = directory(library)
    names.register("mine", "support", any_adapter)
    put(library, tmp_path, "support", 2)
    assert names.resolve("mine").mix == ((first.card.id, 1.0),)
    library.remove("support@1")
    with pytest.raises(LibraryError):
        names.resolve("mine")


def test_a_relative_folder_is_looked_for_in_the_roots(library, tmp_path, roots):
    written_adapter(roots / "deep" / "poet", seed=9)
    names = directory(library, tmp_path / "nothing", roots)
    names.register("poet", "deep/poet", any_adapter)
    written_adapter(roots / "bard", seed=8)
    names.register("bard", "bard", any_adapter)
    assert ids(names)[-2:] == ["bard", "poet"]


def test_in_place_needs_to_be_asked_for(library, roots):
    folder = written_adapter(roots / "poet", seed=9)
    names = directory(library, roots)
    names.register("poet", folder, any_adapter)
    old = names.resolve("poet").mix
    with pytest.raises(InputError, match="'poet' is registered already"):
        names.register("poet", folder, any_adapter)
    shutil.rmtree(folder)
    written_adapter(folder, seed=10)
    with pytest.raises(FileFormatError, match="changed since the adapter was registered"):
        names.files(old[0][0])
    names.register("poet", folder, any_adapter, replace=True)
    new = names.resolve("poet").mix
    assert new != old and names.files(new[0][0]).folder == folder
    with pytest.raises(LibraryError, match="not any more"):
        names.files(old[0][0])


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("tiny", InputError, "a name of the base"),
        ("support", InputError, "in the library already"),
        ("a/b", InputError, "cannot be called"),
        ("x@1", InputError, "cannot be called"),
        ("", InputError, "cannot be called"),
    ],
)
def test_names_that_cannot_be_registered(library, tmp_path, roots, name, error, said):
    put(library, tmp_path, "support", 1)
    with pytest.raises(error, match=said):
        directory(library, roots).register(name, written_adapter(roots / "poet"), any_adapter)


@pytest.mark.parametrize(
    "path", ["{outside}", "../outside", "{root}/../outside", "link", "/etc", "nothing", "{root}/nothing", "a\0b",
             "/" + "x" * 5000, "loop/x", "{root}/file", "neighbour/../../adapters-too"],
)  # fmt: skip
def test_nothing_outside_the_roots_is_loaded(library, tmp_path, roots, path):
    outside = written_adapter(tmp_path / "outside", seed=3)
    written_adapter(tmp_path / "adapters-too", seed=3)
    (roots / "link").symlink_to(outside)
    (roots / "loop").symlink_to(roots / "loop")
    (roots / "file").write_text("text")
    names = directory(library, roots)
    with pytest.raises(LibraryError, match="is not in the library, nor inside a folder"):
        names.register("poet", path.format(outside=outside, root=roots), any_adapter)
    with pytest.raises(LibraryError, match=r"no other folder|it is empty"):
        directory(library).register("poet", path.format(outside=outside, root=roots), any_adapter)
    assert ids(names) == ["org/tiny", "tiny"]


def test_files_that_are_links_to_the_outside_are_not_loaded(library, tmp_path, roots):
    outside = written_adapter(tmp_path / "outside", seed=3)
    folder = roots / "poet"
    folder.mkdir()
    for path in outside.iterdir():
        (folder / path.name).symlink_to(path)
    with pytest.raises(FileFormatError, match=r"holds no adapter_config\.json"):
        directory(library, roots).register("poet", folder, any_adapter)


def test_unusable_and_foreign_folders(library, roots):
    names = directory(library, roots)
    pickled = written_adapter(roots / "pickled")
    (pickled / "adapter_model.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    with pytest.raises(FileFormatError, match="pickle"):
        names.register("poet", pickled, any_adapter)
    foreign = written_adapter(roots / "foreign", seed=4)
    card = card_of(foreign, base_reference("other", structure="x"))
    (foreign / "card.json").write_text(card.model_dump_json())
    with pytest.raises(MismatchError, match="made for 'other'"):
        names.register("poet", foreign, any_adapter)
    assert not names._file.path.exists()


_REGISTERS = """
import os, sys, signal
from pathlib import Path
from haori.library import Library
from haori.serve.adapters.directory import AdapterDirectory
from tests.library_samples import base_reference
names = AdapterDirectory(Library(), base_reference(), base_names=["tiny"], roots=[Path(sys.argv[1])])
names.register("poet", "poet", lambda files, adapter: None)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_registered_names_outlive_a_kill(library, tmp_path, roots):
    folder = written_adapter(roots / "poet", seed=9)
    process = subprocess.run(
        [sys.executable, "-c", _REGISTERS, str(roots)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[2] / place) for place in ("", "src")),
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == -9, process.stderr
    names = directory(library, roots)
    assert names.resolve("poet").mix == ((adapter_id(inspect_adapter(folder)), 1.0),)
    assert ids(directory(library)) == ["org/tiny", "tiny"]  # a server that is not given the root does not serve it
    assert ids(directory(library, roots, base=base_reference(weights="other"))) == ["org/tiny", "tiny"]


def test_two_servers_share_what_is_registered(library, roots):
    one, other = directory(library, roots), directory(library, roots)
    assert ids(other) == ["org/tiny", "tiny"]
    one.register("poet", written_adapter(roots / "poet"), any_adapter)
    assert ids(other)[-1] == "poet"
    other.unregister("poet")
    assert ids(one) == ["org/tiny", "tiny"]


@pytest.mark.parametrize(
    "change",
    [
        lambda document: "{",
        lambda document: json.dumps({**document, "schema_version": 2}),
        lambda document: json.dumps({**document, "names": {"poet": {**document["names"]["poet"], "adapter": "x"}}}),
        lambda document: json.dumps({**document, "code": "import os"}),
    ],
)
def test_a_damaged_file_of_registered_names(library, roots, change):
    names = directory(library, roots)
    names.register("poet", written_adapter(roots / "poet"), any_adapter)
    path = names._file.path
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(StorageError, match="is damaged; restore it, or delete it"):
        directory(library, roots).resolve("poet")


def test_a_changed_path_in_the_file_leads_nowhere(library, tmp_path, roots):
    outside = written_adapter(tmp_path / "outside", seed=3)
    names = directory(library, roots)
    names.register("poet", written_adapter(roots / "poet"), any_adapter)
    path = names._file.path
    document = json.loads(path.read_text())
    document["names"]["poet"]["folder"] = str(outside)
    path.write_text(json.dumps(document))
    assert ids(directory(library, roots)) == ["org/tiny", "tiny"]


def test_many_threads(library, tmp_path, roots):
    put(library, tmp_path, "support", 1)
    names = directory(library, roots)
    folders = [written_adapter(roots / f"poet-{i}", seed=20 + i) for i in range(4)]
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                names.register(f"poet-{number}", folders[number], any_adapter)
                assert names.resolve(f"poet-{number}+support").names == (f"poet-{number}", "support")
                names.unregister(f"poet-{number}")
                with pytest.raises(HaoriError):
                    names.resolve(f"poet-{number}")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert ids(names) == ["org/tiny", "tiny", "support", "support@1"]
