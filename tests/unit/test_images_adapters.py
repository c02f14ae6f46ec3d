"""Adapters of the library and of mounted folders, found by the names that prompts use and read for one base."""

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from haori.core.errors import FileFormatError, LibraryError, MismatchError
from haori.images.adapters import PictureAdapters, read_picture_adapter
from haori.library import Library
from tests.lora_files import kohya_file
from tests.mixed_files import BLOCK, Written, every_kind
from tests.unet_models import text_encoder, unet


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return {"unet": unet("sd15"), "text_encoder": text_encoder(12)}


@pytest.fixture
def tree(tmp_path: Path, components: dict[str, Any]) -> Path:
    root = tmp_path / "models" / "Lora"
    every_kind(components, 1).save(root / "styles" / "ink wash.safetensors", ss_output_name="sumi_e")
    every_kind(components, 2).save(root / "smile.safetensors")
    return root


@pytest.fixture
def adapters(tmp_path: Path, tree: Path, components: dict[str, Any]) -> PictureAdapters:
    library = Library(tmp_path / "library")
    library.mounts.add(tree)
    base: Any = SimpleNamespace(name="tiny", reference=lambda: None)
    return PictureAdapters(components, base, library=library)


def test_found_by_file_name_by_its_trainers_name_and_by_path(adapters: PictureAdapters, tree: Path) -> None:
    for name in ("ink wash", "Ink Wash", "sumi_e", "Lora/styles/ink wash"):
        found = adapters.get(name)
        assert (found.name, found.path) == (name, tree / "styles" / "ink wash.safetensors")
        assert found.components == ("text_encoder", "unet") and not found.notes
    raw = found.path.read_bytes()
    assert found.short_hash == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:12]
    assert found.content_hash == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert [entry.name for entry in adapters.entries()] == ["Lora/smile", "Lora/styles/ink wash"]


def test_what_is_not_there_or_not_told_apart_is_named(adapters: PictureAdapters, tree: Path) -> None:
    for name in ("smil", "../smile", "/etc/passwd", "Lora/../../smile", ""):
        with pytest.raises(LibraryError):
            adapters.get(name)
    (tree / "old").mkdir()
    shutil.copy(tree / "smile.safetensors", tree / "old" / "smile.safetensors")
    with pytest.raises(LibraryError, match=r"'Lora/old/smile' and 'Lora/smile'|'Lora/smile' and 'Lora/old/smile'"):
        adapters.get("smile")
    outside = tree.parent / "outside.safetensors"
    shutil.copy(tree / "smile.safetensors", outside)
    (tree / "link.safetensors").symlink_to(outside)
    with pytest.raises(LibraryError):
        adapters.get("link")


def test_a_file_that_was_replaced_is_read_again(
    adapters: PictureAdapters, tree: Path, components: dict[str, Any]
) -> None:
    before = adapters.get("smile")
    assert adapters.get("smile") is before
    path = tree / "smile.safetensors"
    stat = path.stat()
    every_kind(components, 3).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = adapters.get("smile")
    assert after.content_hash != before.content_hash
    name = f"{BLOCK}.attn1.to_q"
    kept = before.updates[name].factors["A"]
    assert not torch.equal(kept, after.updates[name].factors["A"])
    path.write_bytes(b"\0" * 100)  # what was read keeps no file open
    assert torch.isfinite(kept).all() and kept.norm() > 0


def test_a_folder_that_is_gone_is_one_sentence(adapters: PictureAdapters, tree: Path) -> None:
    adapters.get("smile")
    shutil.rmtree(tree)
    with pytest.raises(LibraryError, match=r"Lora.* is not there"):
        adapters.get("smile")
    assert [scan.problems for scan in adapters.refresh()] != [()]


def test_only_so_many_bytes_are_kept(adapters: PictureAdapters) -> None:
    first, second = adapters.get("smile"), adapters.get("sumi_e")
    adapters.capacity_bytes = first.size_bytes + second.size_bytes
    assert adapters.get("smile") is first and adapters.get("sumi_e") is second
    adapters.capacity_bytes = second.size_bytes
    adapters.get("sumi_e")
    assert adapters.get("smile") is not first


def test_an_adapter_of_another_base_is_refused_with_both_named(
    adapters: PictureAdapters, tree: Path, components: dict[str, Any]
) -> None:
    kohya_file(tree / "xl.safetensors", context=2048, ss_base_model_version="sdxl_base_v1-0")
    with pytest.raises(MismatchError, match=r"'xl' was not made for the base 'tiny'.*Stable Diffusion XL"):
        adapters.get("xl")
    written = Written(4)
    written.lora(f"{BLOCK}.attn1.to_q", components["unet"].get_submodule(f"{BLOCK}.attn1.to_q".removeprefix("unet.")))
    prefix = next(iter(written.tensors)).partition(".")[0]
    for change, message in (
        ({f"{prefix}.lora_down.weight": torch.zeros(3, 5)}, "do not fit|None of its modules fits"),
        ({f"{prefix}.oft_blocks": torch.zeros(2, 4, 4)}, "OFT"),
        ({"lora_unet_no_such_place.lora_up.weight": torch.zeros(8, 3)}, "no_such_place"),
        ({f"{prefix}.surprise": torch.zeros(3)}, "surprise"),
    ):
        damaged = Written(4)
        damaged.tensors = {**written.tensors, **change}
        with pytest.raises((MismatchError, FileFormatError), match=message):
            read_picture_adapter(damaged.save(tree / "damaged.safetensors"), components, base="tiny")


def test_what_changes_no_weight_is_noted(tmp_path: Path, components: dict[str, Any]) -> None:
    written = every_kind(components, 5)
    written.tensors["bundle_emb.word.string_to_param.*"] = torch.zeros(2, 12)
    found = read_picture_adapter(written.save(tmp_path / "a.safetensors"), components, base="tiny")
    assert len(found.notes) == 1 and "bundle_emb.word" in found.notes[0] and "not used" in found.notes[0]
