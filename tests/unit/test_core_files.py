"""Safetensors headers, atomic storage, hashing."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from haori.core.errors import DataError, FileFormatError, HaoriError, StorageError, nearest
from haori.core.hashing import hash_bytes, hash_data, hash_file, hash_parts
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import explain_os_errors, make_folder, staged_folder, write_text


def header(entries: dict[str, object], data: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_reads_what_safetensors_writes(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.int64)}, path, {"k": "v"})
    found = read_safetensors_header(path)
    assert found.tensors["a"].shape == (2, 3)
    assert found.tensors["b"].dtype == "I64"
    assert found.metadata == {"k": "v"}


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": shape if shape is not None else [end - start],
        "data_offsets": [start, end],
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 2 << 30) + b"{}", "header claims 2,147,483,648 bytes"),
        (struct.pack("<Q", 100) + b"{}", "inside its header: the file is truncated"),
        (struct.pack("<Q", 3) + b"abc", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (header({"a": entry(0, 8)}, b"1234"), "holds 4 of 8 bytes"),
        (header({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlaps"),
        (header({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "gap"),
        (header({"a": entry(0, 2)}, b"123456"), "follow the last tensor"),
        (header({"a": entry(0, 4, [3])}, b"1234"), "does not fill"),
        (header({"a": entry(0, 4, [-4])}, b"1234"), "invalid shape"),
        (header({"a": entry(0, 4, dtype="F99")}, b"1234"), "unknown dtype"),
        (header({"a": 1}), "malformed"),
        (header({"__metadata__": {"a": 1}}), "not a table of strings"),
        (pickle.dumps({"a": 1}), "Python pickle"),
        (b"PK\x03\x04" + b"0" * 100, "pickle checkpoint"),
        (b"GGUF" + b"0" * 100, "itself as the base"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=sentence):
        read_safetensors_header(path)


PICKLE_LIKE = (0x0280, 0x0380, 0x0480, 0x0580)


def test_every_length_of_a_header_is_read(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    entries = json.dumps({"a": entry(0, 1)}).encode()
    with path.open("wb", buffering=0) as file:
        file.write(bytes(8) + entries)
        for length in (*range(len(entries), 70_001), *(0x10000 * n + low for n in (2, 250) for low in PICKLE_LIKE)):
            os.pwrite(file.fileno(), struct.pack("<Q", length), 0)
            padding = 8 + length - file.seek(0, os.SEEK_END)
            file.write(b" " * padding + b"1")
            assert read_safetensors_header(path).data_start == 8 + length
            os.pwrite(file.fileno(), b" ", 8 + length)


@pytest.mark.parametrize("length", range(8, 51))
def test_every_length_of_an_empty_header_is_read(tmp_path: Path, length: int):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
    assert read_safetensors_header(path).tensors == {}


@pytest.mark.parametrize("length", PICKLE_LIKE)
def test_a_truncated_file_with_such_a_length_is_called_truncated(tmp_path: Path, length: int):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":')
    with pytest.raises(FileFormatError, match="the file is truncated"):
        read_safetensors_header(path)


def _checkpoints() -> list[object]:
    content = {"a.weight": np.zeros(3, np.float32), "{" * 700: list(range(300))}
    return [*(pickle.dumps(content, protocol) for protocol in (2, 3, 4, 5)), pickle.dumps(None, 2), b"torch", b"legacy"]


@pytest.mark.parametrize("content", _checkpoints(), ids=range(7))
def test_real_checkpoints_are_refused_with_their_conversion(tmp_path: Path, content: bytes):
    import torch

    path = tmp_path / "a.safetensors"
    if content in (b"torch", b"legacy"):
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=content == b"torch")
    else:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"pickles can run code.*haori library convert-pickle"):
        read_safetensors_header(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 120))
def test_any_damage_is_an_answer_never_another_exception(tmp_path: Path, noise: bytes, cut: int):
    path = tmp_path / "a.safetensors"
    good = header({"a": entry(0, 4)}, b"1234")
    path.write_bytes(good[:cut] + noise)
    try:
        read_safetensors_header(path)
    except HaoriError as error:
        assert str(path) in str(error)


def test_a_failed_stage_leaves_the_old_folder_and_nothing_else(tmp_path: Path):
    final = tmp_path / "x"
    with staged_folder(final) as stage:
        (stage / "f").write_text("old")
    with pytest.raises(ValueError, match="stop"), staged_folder(final) as stage:
        (stage / "f").write_text("new")
        raise ValueError("stop")
    assert (final / "f").read_text() == "old"
    with staged_folder(final) as stage:
        (stage / "f").write_text("new")
    assert (final / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_write_text_replaces_in_one_step(tmp_path: Path):
    path = tmp_path / "a.json"
    write_text(path, "1")
    write_text(path, "22")
    assert path.read_text() == "22"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path):
    (tmp_path / "f").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        make_folder(tmp_path / "f" / "g")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_sentence():
    with pytest.raises(StorageError, match="disk is full"), explain_os_errors(Path("/dev/full")):
        descriptor = os.open("/dev/full", os.O_WRONLY)
        try:
            os.write(descriptor, b"x")
        finally:
            os.close(descriptor)


def test_storage_is_blamed_only_by_what_writes():
    """The words of an OS error in another error's sentence say nothing about the file that is being written."""
    for error in (ValueError("Permission denied"), DataError("data.csv: Permission denied (os error 13)")):
        with pytest.raises(type(error)) as caught, explain_os_errors(Path("out")):
            raise error
        assert caught.value is error


def test_what_safetensors_and_tokenizers_say_of_a_file_in_the_way_is_a_sentence(tmp_path: Path):
    from tokenizers import Tokenizer, models

    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "inside"
    with pytest.raises(StorageError, match="a part of the path is a file"), explain_os_errors(place):
        save_file({"a": np.zeros(3)}, place)
    with pytest.raises(StorageError, match="a part of the path is a file"), explain_os_errors(place):
        Tokenizer(models.BPE()).save(str(place))


def test_file_hash_follows_content_through_the_cache(tmp_path: Path):
    path = tmp_path / "big"
    path.write_bytes(b"a" * (3 << 20))
    first = hash_file(path)
    assert first == hash_bytes(b"a" * (3 << 20)) == hash_file(path)
    path.write_bytes(b"b" * (3 << 20))
    os.utime(path, ns=(1, 1))
    assert hash_file(path) == hash_bytes(b"b" * (3 << 20))


def test_a_hub_blob_is_known_by_its_name(tmp_path: Path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = "ab" * 32
    (blobs / name).write_bytes(b"whatever")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blobs / name)
    assert hash_file(link) == f"sha256:{name}"


def test_hashes_of_parts_do_not_run_together():
    assert hash_parts(["ab", "c"]) != hash_parts(["a", "bc"])
    assert hash_data({"b": 1, "a": 2}) == hash_data({"a": 2, "b": 1})


def test_nearest_names_are_suggested():
    assert nearest("q_porj", ["q_proj", "down_proj"]).startswith("did you mean 'q_proj'")
    assert nearest("zzz", ["q_proj"]) == ""
