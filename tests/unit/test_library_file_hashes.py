"""Hashes as model sites know a file, against their definitions."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from haori.library.file_hashes import hash_weight_file


@pytest.mark.parametrize("values", [10, 300_000, 1 << 20])
def test_hashes_are_of_the_bytes_that_their_names_mean(tmp_path: Path, values: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.randn(values)}, path, {"ss_seed": "1"})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = hash_weight_file(path)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.autov1 == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found.autov2 == found.sha256[:10]
    assert found.autov3 == hashlib.sha256(data[start:]).hexdigest()[:12]
    save_file({"w": torch.zeros(values)}, path, {"ss_seed": "1"})
    assert hash_weight_file(path).autov3 != found.autov3


def test_editing_metadata_keeps_autov3_alone(tmp_path: Path) -> None:
    weights = {"w": torch.randn(100)}
    save_file(weights, tmp_path / "a.safetensors", {"title": "one"})
    save_file(weights, tmp_path / "b.safetensors", {"title": "two, and longer"})
    one, two = (hash_weight_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.autov3 == two.autov3 and one.sha256 != two.sha256


def test_another_file_has_no_autov3(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert set(hash_weight_file(path).as_dict()) == {"sha256", "autov1", "autov2"}
