"""Mounted trees: read in place, seen as they change, found by every name people use, nothing of them written."""

import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest

from haori.core.errors import InputError, LibraryError
from haori.library import Library
from haori.library.mounts import mounts as mounts_module
from tests.command_line import haori
from tests.library_samples import card_of, written_adapter
from tests.lora_files import kohya_file


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "Lora"
    kohya_file(root / "smile.safetensors", seed=1, ss_output_name="happy_face", ss_base_model_version="sd_v1")
    kohya_file(root / "styles" / "ink.safetensors", seed=2, rank=4)
    kohya_file(root / "styles" / "old" / "山の絵.safetensors", seed=3, context=2048)
    sidecar = {
        "description": "A gentle smile", "sd version": "SD1", "activation text": "smiling, happy face",
        "preferred weight": 0.7, "negative text": "frown", "notes": "from 2024", "another tool": {"keep": [1, 2]},
    }  # fmt: skip
    (root / "smile.json").write_text(json.dumps(sidecar))
    (root / "smile.preview.png").write_bytes(b"png")
    return root


def rested(root: Path) -> Path:
    """Make a tree as it is some time after its last change."""
    for path in (*root.rglob("*"), root):
        os.utime(path, (time.time() - 100,) * 2)
    return root


def names(library: Library, query: str = "") -> list[str]:
    library.mounts.rescan()
    return [listed.entry.full_name for listed in library.search(query).listed]


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_tree_is_read_in_place_and_left_as_it_is(library, tree):
    before = everything(tree)
    scan = library.mounts.add(tree)
    assert (scan.mount, scan.files, scan.changed, scan.problems) == ("Lora", 3, 3, ())
    assert names(library) == ["Lora/smile", "Lora/styles/ink", "Lora/styles/old/山の絵"]
    stored = library.get("Lora/smile")
    assert stored.path == tree / "smile.safetensors" and stored.name == "Lora/smile"
    card, said = stored.card, stored.mounted.sidecars
    assert (card.format, card.base.family, card.rank, card.origin, card.verification) == (
        "kohya",
        "sd15",
        2,
        "added",
        None,
    )
    assert card.trigger_words == ("smiling", "happy face") and card.description == "A gentle smile"
    assert (said.strength, said.negative_prompt, said.notes, said.preview) == (
        0.7, "frown", "from 2024", "smile.preview.png",
    )  # fmt: skip
    assert card.id == f"sha256:{hashlib.sha256(stored.path.read_bytes()).hexdigest()}"
    assert library.get("Lora/styles/ink").card.rank == 4
    assert library.get("山の絵").card.base.family == "sdxl"
    assert everything(tree) == before
    assert not (library.root / "adapters").exists()


def test_found_by_file_name_alias_and_hash(library, tree):
    library.mounts.add(tree)
    path = tree / "smile.safetensors"
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    autov2, autov3 = hashlib.sha256(raw).hexdigest()[:10], hashlib.sha256(data).hexdigest()[:12]
    for spec in ("smile", "SMILE", "happy_face", "Happy_Face", "Lora/smile", "lora/SMILE"):
        assert library.get(spec).name == "Lora/smile", spec
    with pytest.raises(LibraryError, match="not hashed yet; run `haori library mounts --hash`"):
        library.get("0" * 12)
    assert library.mounts.hash_all() >= 2  # one was hashed when it was asked for
    for spec in (autov2, autov2.upper(), autov3, f"sha256:{hashlib.sha256(raw).hexdigest()}"):
        assert library.get(spec).name == "Lora/smile", spec
    with pytest.raises(LibraryError, match="no adapter '000000000000'"):
        library.get("0" * 12)


def test_a_stated_hash_is_checked_before_it_is_believed(library, tree):
    raw = (tree / "styles/ink.safetensors").read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    truth, lie = hashlib.sha256(data).hexdigest(), "ab" * 32
    kohya_file(tree / "true.safetensors", seed=2, rank=4, sshs_model_hash=truth)
    kohya_file(tree / "liar.safetensors", seed=9, sshs_model_hash=lie)
    library.mounts.add(tree)
    assert library.get(truth[:12]).name == "Lora/true"
    with pytest.raises(LibraryError, match=r"'Lora/liar' states the hash 'abababababab', but its content has not"):
        library.get(lie[:12])


def test_one_name_in_two_folders_is_an_error_that_names_both(library, tree, tmp_path):
    kohya_file(tree / "faces" / "ink.safetensors", seed=4)
    library.mounts.add(tree)
    with pytest.raises(
        LibraryError, match=r"'ink' may mean 'Lora/faces/ink' and 'Lora/styles/ink'|'Lora/styles/ink' and"
    ):
        library.get("ink")
    assert library.get("Lora/faces/ink").path.parent.name == "faces"
    shutil.copy(tree / "smile.safetensors", tree / "smile.SAFETENSORS")
    assert {"Lora/smile.safetensors", "Lora/smile.SAFETENSORS"} <= set(names(library))
    with pytest.raises(LibraryError, match=r"'smile' may mean 'Lora/smile.*' and 'Lora/smile"):
        library.get("smile")
    with pytest.raises(LibraryError, match=r"'Lora' has no adapter 'Lora/smile'; did you mean .*'Lora/smile.S"):
        library.get("Lora/smile")
    # What is stored comes first: putting a file into a tree changes no adapter that was proved.
    folder = written_adapter(tmp_path / "made")
    library.add(folder, "ink", card_of(folder))
    assert library.get("ink").name == "ink@1" and library.get("Lora/styles/ink").mounted


@pytest.mark.parametrize("settled", [False, True])
def test_changes_are_seen(library, tree, settled):
    if settled:
        rested(tree)
    library.mounts.add(tree)
    assert library.get("Lora/styles/ink").card.rank == 4
    kohya_file(tree / "styles" / "ink.safetensors", seed=2, rank=8)  # written over
    assert library.get("Lora/styles/ink").card.rank == 8
    (tree / "smile.json").write_text(json.dumps({"activation text": "grin"}))
    assert library.get("Lora/smile").card.trigger_words == ("grin",)
    (tree / "styles" / "ink.json").write_text(json.dumps({"activation text": "inked"}))  # a sidecar where none was
    assert library.get("Lora/styles/ink").card.trigger_words == ("inked",)
    kohya_file(tree / "new.safetensors", seed=7)
    assert library.get("new").name == "Lora/new"
    (tree / "smile.safetensors").rename(tree / "styles" / "smile.safetensors")
    assert library.get("smile").name == "Lora/styles/smile"
    shutil.rmtree(tree / "styles")
    assert names(library) == ["Lora/new"]
    with pytest.raises(LibraryError, match="no adapter 'smile'"):
        library.get("smile")


def test_a_new_file_of_the_same_name_is_noticed_when_it_is_asked_for(library, tree):
    rested(tree)
    library.mounts.add(tree)
    assert library.get("ink").name == "Lora/styles/ink"
    kohya_file(tree / "ink.safetensors", seed=8)
    with pytest.raises(LibraryError, match="may mean"):
        library.get("ink")


def test_the_same_size_and_time_do_not_hide_a_change(library, tree):
    rested(tree)
    library.mounts.add(tree)
    path = tree / "smile.safetensors"
    first, stat = library.get("Lora/smile").card.id, path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert library.get("Lora/smile").card.id != first


def test_an_unchanged_tree_is_not_read_again(library, tree, monkeypatch):
    rested(tree)
    library.mounts.add(tree)
    library.mounts.rescan()  # the change of times above is recent, too
    time.sleep(2.1)
    library.mounts.rescan()
    monkeypatch.setattr(mounts_module, "describe", lambda *_: pytest.fail("a file was read"))
    (scan,) = library.mounts.rescan()
    assert (scan.files, scan.changed) == (3, 0)
    assert names(library, "trigger:smiling") == ["Lora/smile"]


def test_files_that_cannot_be_used_are_listed_with_the_reason_and_hurt_no_other(library, tree):
    good = (tree / "smile.safetensors").read_bytes()
    (tree / "cut.safetensors").write_bytes(good[:-8])
    (tree / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tree / "empty.safetensors").write_bytes(b"")
    (tree / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    (tree / "huge.safetensors").write_bytes((1 << 50).to_bytes(8, "little") + b"{}" * 10)
    (tree / "bad\nname.safetensors").write_bytes(good)
    os.mkfifo(tree / "pipe.safetensors")
    (tree / "x").mkdir()
    Path(os.fsdecode(os.fsencode(tree / "x") + b"/\xff\xfe.safetensors")).write_bytes(good)
    (tree / "styles" / "ink.json").write_text("{not json")
    library.mounts.add(tree)
    listed = {one.entry.name: one.entry.problem for one in library.search("").listed}
    said = {
        "Lora/cut": "truncated", "Lora/page": "safetensors", "Lora/empty": "too short", "Lora/old": "is a pickle",
        "Lora/huge": "at most",
        "Lora/'bad\\nname": "control characters", "Lora/'x/\\udcff\\udcfe": "control characters",
    }  # fmt: skip
    for name, words in said.items():
        (found,) = [problem for key, problem in listed.items() if key.startswith(name)]
        assert words in str(found), (name, found)
    assert [name for name, problem in listed.items() if problem is None] == [
        "Lora/smile", "Lora/styles/ink", "Lora/styles/old/山の絵",
    ]  # fmt: skip
    with pytest.raises(LibraryError, match=r"'Lora/cut' cannot be used: .*truncated"):
        library.get("cut")
    assert "no JSON object" in library.get("ink").mounted.sidecars.problems[0]


def test_links_out_of_the_tree_are_not_followed(library, tree, tmp_path):
    outside = kohya_file(tmp_path / "outside" / "secret.safetensors", seed=5)
    (tree / "link.safetensors").symlink_to(outside)
    (tree / "linked").symlink_to(outside.parent)
    (tree / "loop").symlink_to(tree)
    (tree / "again.safetensors").symlink_to(tree / "smile.safetensors")
    (tree / "dangling.safetensors").symlink_to(tree / "nothing.safetensors")
    (tmp_path / "outside" / "notes.json").write_text('{"notes": "secret"}')
    (tree / "styles" / "ink.json").symlink_to(tmp_path / "outside" / "notes.json")
    scan = library.mounts.add(tree)
    assert names(library) == ["Lora/again", "Lora/smile", "Lora/styles/ink", "Lora/styles/old/山の絵"]
    assert len([problem for problem in scan.problems if "leads out of the tree" in problem]) == 2
    assert library.get("ink").mounted.sidecars.notes == ""


def test_civitai_info_says_where_it_is_from_and_what_is_allowed(library, tree):
    sha256 = hashlib.sha256((tree / "styles" / "ink.safetensors").read_bytes()).hexdigest()
    info = {
        "id": 1234, "modelId": 99, "name": "v2", "baseModel": "SD 1.5", "trainedWords": ["ink wash", "sumi-e"],
        "description": "<p>Ink &amp; water</p>",
        "model": {"name": "Ink", "type": "LORA", "nsfw": True, "tags": ["painting"], "allowNoCredit": False,
                  "allowCommercialUse": "{Image,RentCivit}", "allowDerivatives": True, "allowDifferentLicense": False},
        "files": [{"name": "ink.safetensors", "hashes": {"SHA256": sha256.upper(), "AutoV2": sha256[:10].upper()}}],
    }  # fmt: skip
    (tree / "styles" / "ink.civitai.info").write_text(json.dumps(info))
    library.mounts.add(tree)
    card = library.get(sha256[:10]).card
    assert card.trigger_words == ("ink wash", "sumi-e") and card.tags == ("painting",)
    assert card.downloaded_from == "civitai:1234" and card.description == "Ink water"
    assert card.permissions.model_dump() == {
        "no_credit": False, "commercial_use": ("Image", "RentCivit"), "derivatives": True, "different_licence": False,
    }  # fmt: skip
    assert names(library, "tag:painting base:sd15") == ["Lora/styles/ink"]


def test_the_kind_of_base_is_told_by_names_where_no_header_says_it(library, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    root = tmp_path / "images"
    root.mkdir()
    modules = {
        "flux1": "transformer.single_transformer_blocks.0.attn.to_q",
        "flux2": "transformer.transformer_blocks.0.ff.linear_in",
        "qwen_image": "transformer.transformer_blocks.3.img_mlp.net.0.proj",
        "z_image": "transformer.context_refiner.0.attention.to_q",
    }
    for family, module in modules.items():
        tensors = {f"{module}.lora_A.weight": np.ones((4, 32), "f4"), f"{module}.lora_B.weight": np.ones((32, 4), "f4")}
        save_file(tensors, root / f"{family}.safetensors")
    library.mounts.add(root)
    found = {one.entry.name: one.entry.family for one in library.search("").listed}
    assert found == {f"images/{family}": family for family in modules}


def test_what_is_mounted_cannot_be_changed_or_removed_as_if_stored(library, tree):
    library.mounts.add(tree)
    for change in (library.remove, library.promote, lambda spec: library.update(spec, description="x")):
        with pytest.raises(LibraryError, match="lies in a mounted folder, which is only read"):
            change("Lora/smile")
    assert (tree / "smile.safetensors").is_file()


def test_mounts_lie_apart_and_have_names(library, tree, tmp_path):
    library.mounts.add(tree)
    assert library.mounts.add(tree).mount == "Lora"  # again is no change
    for folder, name, error, said in [
        (tree / "styles", None, LibraryError, "lie in each other"),
        (tree.parent, "all", LibraryError, "lie in each other"),
        (tmp_path / "nothing", None, InputError, "is not a folder"),
        (tree / "smile.json", None, InputError, "is not a folder"),
        (tree, "../x", LibraryError, "cannot be called '../x'"),
    ]:
        with pytest.raises(error, match=said):
            library.mounts.add(folder, name)
    other = tmp_path / "other" / "Lora"
    other.mkdir(parents=True)
    with pytest.raises(LibraryError, match=r"give .* another name"):
        library.mounts.add(other)
    with pytest.raises(LibraryError, match="no mount 'Lor'; did you mean 'Lora'"):
        library.mounts.remove("Lor")
    assert library.mounts.remove("Lora") == tree
    assert library.search("") == ((), {}) and (tree / "smile.safetensors").is_file()


def test_a_tree_that_is_away_is_told_and_comes_back(library, tree, tmp_path):
    library.mounts.add(tree)
    tree.rename(tmp_path / "away")
    (scan,) = library.mounts.rescan()
    assert "is not there" in scan.problems[0]
    assert names(library) == []
    (tmp_path / "away").rename(tree)
    assert "Lora/smile" in names(library)


@pytest.mark.parametrize("damage", [b"", b"no database" * 500, None])
def test_what_is_remembered_can_be_lost(library, tree, damage):
    library.mounts.add(tree)
    path = library.root / "mounted.sqlite"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert library.get("happy_face").name == "Lora/smile"
    assert len(names(library)) == 3


def test_stored_and_mounted_are_listed_and_searched_together(capsys, haori_home, tree, tmp_path):
    folder = written_adapter(tmp_path / "made")
    Library().add(folder, "smile-text", card_of(folder))
    done = haori(capsys, "library", "mount", tree, "--name", "loras")
    assert done.code == 0, done.err
    listed = haori(capsys, "library", "list").out
    assert "loras/smile (mounted)" in listed and "smile-text@1" in listed
    found = haori(capsys, "library", "search", "smile").out
    assert found.index("loras/smile") < found.index("smile-text@1")
    assert "smile-text" not in haori(capsys, "library", "search", "mount:loras").out
    shown = haori(capsys, "library", "show", "smile").out
    assert "0.7" in shown and "frown" in shown and "read in place" in shown
    assert "3" in haori(capsys, "library", "mounts", "--hash").out
    done = haori(capsys, "library", "remove", "loras/smile")
    assert done.code == 2 and "only read" in done.err
    assert haori(capsys, "library", "unmount", "loras").code == 0
    assert "loras" not in haori(capsys, "library", "list").out
