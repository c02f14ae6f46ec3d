import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from haori.core.errors import InputError, LibraryError, StorageError
from haori.core.records import Check, DataReference, Evaluation, Metric, Verification
from haori.library import Library, adapter_id, inspect_adapter, store
from haori.library.cards import read_card
from tests.library_samples import base_reference, card_of, written_adapter


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def put(library: Library, tmp_path: Path, name: str, seed: int, **fields):
    folder = tmp_path / f"made-{seed}"
    if not folder.exists():
        written_adapter(folder, seed=seed)
    return library.add(folder, name, card_of(folder, **fields))


def names(library: Library) -> list[str]:
    return [stored.name for stored in library.list()]


def found(library: Library, query: str) -> list[str]:
    return [listed.entry.full_name for listed in library.search(query).listed]


def test_default_root_is_the_setting(haori_home):
    assert Library().root == haori_home / "library"
    assert Library().list() == ()
    assert not haori_home.exists()


def test_versions_count_up_and_get_finds_the_newest(library, tmp_path):
    first, second = put(library, tmp_path, "support", 1), put(library, tmp_path, "support", 2)
    assert (first.name, second.name) == ("support@1", "support@2")
    assert library.get("support").card == second.card
    assert library.get("support@1").card == first.card
    digits = first.card.id.removeprefix("sha256:")
    assert library.get(digits[:8]).name == "support@1"
    assert library.get(first.card.id).path == library.root / "adapters" / digits[:2] / digits


def test_same_content_is_stored_once(library, tmp_path):
    first = put(library, tmp_path, "support", 1)
    put(library, tmp_path, "support", 2)
    assert put(library, tmp_path, "support", 1).name == "support@1"
    other = put(library, tmp_path, "helper", 1)
    assert other.name == "helper@1" and other.path == first.path
    assert library.get("support@1").card.names == ("support@1", "helper@1")
    assert len(list(library.root.glob("adapters/*/*"))) == 2


def test_the_same_files_are_stored_for_two_bases(library, tmp_path):
    first = put(library, tmp_path, "support", 1)
    other = base_reference("other", weights="other")
    second = put(library, tmp_path, "support", 1, base=other)
    assert (first.name, second.name) == ("support@1", "support@2") and first.card.id != second.card.id
    assert [stored.card.base.name for stored in library.list()] == ["tiny", "other"]
    # Each is found again as it is: under its name, under another, and by its id.
    assert put(library, tmp_path, "support", 1, base=other).name == "support@2"
    assert put(library, tmp_path, "support", 1).name == "support@1"
    assert put(library, tmp_path, "helper", 1, base=other).card.names == ("support@2", "helper@1")
    assert library.get(second.card.id).card.base.name == "other"
    assert library.rebuild() == (2, ())
    library.remove(first.card.id)
    assert put(library, tmp_path, "again", 1, base=other).path == second.path
    assert put(library, tmp_path, "again", 1).card.id == first.card.id
    assert library.rebuild() == (2, ()) and len(list(library.root.glob("adapters/*/*"))) == 2


def test_a_change_reads_no_other_card(library, tmp_path, monkeypatch):
    for seed in range(8):
        put(library, tmp_path, f"adapter-{seed % 3}", seed)
    read: list[Path] = []

    def counted(folder: Path):
        read.append(folder)
        return read_card(folder)

    monkeypatch.setattr(store, "read_card", counted)
    for change in (
        lambda: put(library, tmp_path, "new", 20),
        lambda: put(library, tmp_path, "other", 1),
        lambda: library.update("new", description="changed"),
        lambda: library.promote("adapter-1@1"),
        lambda: library.remove("new"),
    ):
        read.clear()
        change()
        assert len({*read}) <= 2 and len(read) <= 3, read  # its own folder, and where it would be for another base
    (library.root / "index.sqlite").unlink()
    assert put(library, tmp_path, "adapter-2", 21).name == "adapter-2@3"
    library.mark.touch()
    assert put(library, tmp_path, "adapter-2", 22).name == "adapter-2@4"
    assert not library.mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a@1",
        "../up",
        "a/b",
        ".hidden",
        "x" * 101,
        "a b",
        "Ünicode",
        "..",
        "a.",
        "CON",
        "nul.v2",
        "com7",
        "a\x00b",
        "a\n",
        "\u202eevil",
    ],
)
def test_bad_names(library, tmp_path, name):
    with pytest.raises(LibraryError, match="cannot be called"):
        put(library, tmp_path, name, 1)
    assert not library.root.exists()


def test_only_proven_adapters_are_taken(library, tmp_path):
    failed = Verification(
        passed=False, checks=(Check(name="delta", passed=False, detail="zero"),), dtype="fp32", time="now"
    )
    for verification in (None, failed):
        with pytest.raises(LibraryError, match="passed its proof"):
            put(library, tmp_path, "support", 1, verification=verification)
    assert not library.root.exists()


def test_a_card_of_other_files_is_refused(library, tmp_path):
    card = card_of(written_adapter(tmp_path / "a", seed=1))
    with pytest.raises(LibraryError, match="does not describe"):
        library.add(written_adapter(tmp_path / "b", seed=2), "support", card)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("suport", "did you mean 'support'"),
        ("support@9", "no version '9'; it has 1, 2"),
        ("support@", None),
        ("abcdef", "haori library list"),
    ],
)
def test_unknown_specs(library, tmp_path, spec, said):
    put(library, tmp_path, "support", 1)
    put(library, tmp_path, "support", 2)
    if said is None:
        assert library.get(spec).name == "support@2"
        return
    with pytest.raises(LibraryError, match=said):
        library.get(spec)


def test_empty_library_says_so(library):
    with pytest.raises(LibraryError, match="it is empty"):
        library.get("support")


def test_remove_takes_names_then_the_folder(library, tmp_path):
    path = put(library, tmp_path, "support", 1).path
    put(library, tmp_path, "helper", 1)
    put(library, tmp_path, "support", 2)
    assert library.remove("support@1") == ("support@1",)
    assert names(library) == ["helper@1", "support@2"] and path.is_dir()
    assert library.remove("helper") == ("helper@1",)
    assert names(library) == ["support@2"] and not path.exists()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(LibraryError, match="no adapter 'helper'"):
        library.remove("helper")
    assert names(library) == ["support@2"]


def test_remove_by_id_takes_every_name(library, tmp_path):
    stored = put(library, tmp_path, "support", 1)
    put(library, tmp_path, "helper", 1)
    assert library.remove(stored.card.id) == ("support@1", "helper@1")
    assert library.list() == () and not stored.path.exists()


def test_search_looks_at_every_field(library, tmp_path):
    data = DataReference(source="reviews.jsonl", hash="h", format="messages", rows={"train": 3}, licence="CC-BY-4.0")
    put(library, tmp_path, "support", 1, description="Answers parcels", data=(data,))
    put(library, tmp_path, "poet", 2, base=base_reference("gemma", structure="g"))
    for words in ("PARCELS", "reviews.jsonl", "cc-by", "supp", "tiny lora", "answers tiny"):
        assert found(library, words) == ["support@1"], words
    assert found(library, "gemma") == ["poet@1"]
    assert found(library, "parcels gemma") == []
    assert found(library, "100%") == []


def test_update_adds_evaluations_and_keeps_identity(library, tmp_path):
    stored = put(library, tmp_path, "support", 1)
    data = DataReference(source="t", hash="h", format="messages", rows={"test": 3})
    for value in (0.5, 0.7):
        evaluation = Evaluation(data=data, metrics={"accuracy": Metric(value=value)}, time="now")
        library.update("support", evaluations=(evaluation,))
    library.update("support", description="new words")
    card = Library(library.root).get("support").card
    assert [e.metrics["accuracy"].value for e in card.evaluations] == [0.5, 0.7]
    assert (card.id, card.names) == (stored.card.id, ("support@1",))
    assert found(library, "new words") == ["support@1"]
    with pytest.raises(LibraryError, match="'id' cannot be changed"):
        library.update("support", id="sha256:0")


def test_id_ignores_where_and_by_whom_it_was_saved(tmp_path):
    def identity(name: str, **config) -> str:
        return adapter_id(inspect_adapter(written_adapter(tmp_path / name, **config)))

    plain = identity("a", target_modules=["q_proj", "v_proj"])
    moved = identity(
        "b", target_modules=["v_proj", "q_proj"], base_model_name_or_path="/x", peft_version="9", new_option=None
    )
    assert plain == moved
    assert plain != identity("c", target_modules=["q_proj", "v_proj"], lora_alpha=16)
    assert plain != identity("d", target_modules=["q_proj", "v_proj"], use_rslora=True)


def test_only_files_of_an_adapter_are_copied(library, tmp_path):
    folder = written_adapter(tmp_path / "a")
    (folder / "README.md").write_text("hello")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "loss.png").write_bytes(b"png")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    (folder / "run.py").write_text("import os")
    (folder / "checkpoint-1").mkdir()
    stored = library.add(folder, "support", card_of(folder))
    held = {path.name for path in stored.path.iterdir()}
    expected = {"README.md", "chat_template.jinja", "loss.png", "adapter_config.json", "adapter_model.safetensors"}
    assert held == {*expected, "card.json"}
    out = library.export("support", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == expected


def test_export_is_a_new_folder_with_a_base_others_can_find(library, tmp_path):
    base = base_reference("smol").with_fields(source="hub:org/smol", revision="abc")
    stored = put(library, tmp_path, "support", 1, base=base)
    out = library.export("support", tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/smol", "abc")
    assert adapter_id(inspect_adapter(out)) == stored.card.id
    with pytest.raises(InputError, match="not an empty folder"):
        library.export("support", out)


@pytest.mark.parametrize("damage", ["gone", "garbage", "empty", "half", "marked"])
def test_index_is_made_again(library, tmp_path, damage):
    put(library, tmp_path, "support", 1)
    put(library, tmp_path, "helper", 2)
    assert names(library) == ["helper@1", "support@1"]
    index = library.root / "index.sqlite"
    if damage == "gone":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"this is no database" * 300)
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "half":
        index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    else:
        shutil.rmtree(library.get("helper").path)
        (library.root / ".changing").touch()
    expected = ["support@1"] if damage == "marked" else ["helper@1", "support@1"]
    assert names(library) == expected
    assert library.get("support").name == "support@1"
    assert put(library, tmp_path, "support", 3).name == "support@2"


def test_rebuild_leaves_out_and_names_what_is_wrong(library, tmp_path):
    kept = put(library, tmp_path, "kept", 1)
    changed, damaged = put(library, tmp_path, "changed", 2), put(library, tmp_path, "damaged", 3)
    bare = put(library, tmp_path, "bare", 4)
    shutil.copyfile(kept.path / "adapter_model.safetensors", changed.path / "adapter_model.safetensors")
    (damaged.path / "card.json").write_text('{"id": 3}')
    (bare.path / "card.json").unlink()
    rebuilt = library.rebuild()
    assert rebuilt.adapters == 1 and len(rebuilt.problems) == 3
    for stored in (changed, damaged, bare):
        assert any(str(stored.path) in problem for problem in rebuilt.problems)
    assert names(library) == ["kept@1"]


def test_leftovers_of_killed_processes_are_ignored_then_swept(library, tmp_path):
    stored = put(library, tmp_path, "support", 1)
    staged = stored.path.with_name(f".{stored.path.name}.abc")
    shutil.copytree(stored.path, staged)
    grave = stored.path.with_name(".removed.abc")
    shutil.copytree(stored.path, grave / stored.path.name)
    assert names(library) == ["support@1"]
    assert library.rebuild().problems == ()
    assert not staged.exists() and not grave.exists()


_ADDER = """
import sys
from pathlib import Path
from tests.library_samples import card_of, written_adapter
from haori.library import Library
root, start, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
library = Library(root / "library")
print("ready", flush=True)
sys.stdin.readline()
for seed in range(start, start + count):
    folder = root / f"made-{seed}"
    if not folder.exists():
        written_adapter(folder, seed=seed)
    print(library.add(folder, "shared", card_of(folder)).name, flush=True)
"""


def adder(root: Path, start: int, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _ADDER, str(root), str(start), str(count)]
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_get_distinct_versions(library, tmp_path):
    both = [adder(tmp_path, start, 8) for start in (0, 100)]
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    given = [name for process in both for name in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(given) == sorted(f"shared@{n}" for n in range(1, 17))
    assert sorted(names(library)) == sorted(given)
    assert {Path(s.path).name for s in library.list()} == {p.name for p in library.root.glob("adapters/??/*")}


def test_a_killed_process_leaves_a_whole_library(library, tmp_path):
    for round_number, delay_s in enumerate((0.004, 0.02, 0.05)):
        process = adder(tmp_path, round_number * 1000, 1000)
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split()
        held = names(library)
        assert set(said) <= set(held)
        complete = {place.name for place in library.root.glob("adapters/??/[0-9a-f]*")}
        assert {stored.path.name for stored in library.list()} == complete
        assert library.rebuild().problems == ()
        assert names(library) == held
        assert put(library, tmp_path, "after", 5000 + round_number).name == f"after@{round_number + 1}"


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(small_disk, tmp_path):
    library = Library(small_disk / "library")
    put(library, tmp_path, "support", 1)
    large = written_adapter(tmp_path / "large", seed=7, size=2048)
    with pytest.raises(StorageError, match="the disk is full"):
        library.add(large, "support", card_of(large))
    assert names(library) == ["support@1"]
    assert len([p for p in library.root.glob("adapters/*/*") if p.is_dir()]) == 1
    _fill(small_disk / "filler-1")
    assert names(library) == ["support@1"]
    _fill(small_disk / "filler-2")  # the index, which only saves time, may have been given up
    with pytest.raises(StorageError, match="the disk is full"):
        library.export("support", small_disk / "out")
    assert not (small_disk / "out").exists()
    assert library.remove("support") == ("support@1",)
    assert library.list() == ()


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096) == 4096:
            pass


def test_a_library_that_is_a_file(tmp_path):
    (tmp_path / "library").write_text("I am a file")
    with pytest.raises(StorageError, match="file of that name is in the way"):
        put(Library(tmp_path / "library"), tmp_path, "support", 1)
