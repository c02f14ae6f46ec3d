"""Pickles are converted apart from everything else, and hostile ones do nothing."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from haori.core.errors import FileFormatError, InputError
from haori.library.pickles.converting import convert_pickle
from tests.command_line import haori


class Payload:
    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self):
        return os.system, (self.command,)


def _zipped(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, name: str = "x/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, data)
        archive.writestr("x/version", "3\n")
    return path


def test_tensors_come_out_as_they_are_and_the_rest_is_named(tmp_path, capsys):
    shared = torch.randn(4, 6)
    tensors = {"m.lora_A.weight": shared[:2], "m.lora_B.weight": shared.T.half(), "m.alpha": 3}
    torch.save({"state_dict": tensors, "epoch": 4, "optimizer": {"lr": 1.0}}, tmp_path / "a.pt")
    made = haori(capsys, "library", "convert-pickle", tmp_path / "a.pt", "--out", tmp_path / "new.safetensors")
    assert made.code == 0, made.err
    assert (
        "3 tensors are in" in made.out and "Left out, as they are no tensors by name: 'epoch', 'optimizer'" in made.out
    )
    found = load_file(tmp_path / "new.safetensors")
    assert torch.equal(found["m.lora_A.weight"], shared[:2]) and torch.equal(found["m.lora_B.weight"], shared.T.half())
    assert float(found["m.alpha"]) == 3.0
    with pytest.raises(InputError, match="already exists"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "new.safetensors")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "new.bin")


@pytest.mark.parametrize("kind", ["plain", "zip"])
def test_a_payload_is_refused_and_never_runs(tmp_path, kind):
    mark = tmp_path / "ran"
    data = pickle.dumps({"a": torch.zeros(1), "b": Payload(mark)}, 2)
    path = tmp_path / "evil.bin"
    if kind == "plain":
        path.write_bytes(data)
    else:
        _zipped(path, data)
    with pytest.raises(
        FileFormatError, match=r"it names '(posix|nt|torch)\S+', which no file of tensors needs|hostile"
    ):
        convert_pickle(path, tmp_path / "new.safetensors")
    assert not mark.exists() and sorted(p.name for p in tmp_path.glob("*new*")) == []
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload does run where pickles are read
    assert mark.exists()


def test_a_tensor_that_unfolds_in_memory_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "bomb.pt")
    with pytest.raises(FileFormatError, match="more memory than a file of its size needs"):
        convert_pickle(tmp_path / "bomb.pt", tmp_path / "new.safetensors")
    assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []


def test_zip_bombs_are_refused_before_anything_reads_them(tmp_path):
    packed = _zipped(tmp_path / "packed.pt", bytes(50 << 20), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match="is compressed, which torch never does"):
        convert_pickle(packed, tmp_path / "new.safetensors")
    raw = bytearray(_zipped(tmp_path / "small.pt", b"\x80\x02}.").read_bytes())
    where = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"PK\x01\x02"))  # the directory's first entry claims 3 GB
    raw[where + 24 : where + 28] = (3 << 30).to_bytes(4, "little")
    (tmp_path / "claims.pt").write_bytes(raw)
    with pytest.raises(FileFormatError, match=r"claim .* bytes, more than the file has"):
        convert_pickle(tmp_path / "claims.pt", tmp_path / "new.safetensors")
    (tmp_path / "cut.pt").write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(FileFormatError, match="a damaged zip archive"):
        convert_pickle(tmp_path / "cut.pt", tmp_path / "new.safetensors")


def test_a_file_that_takes_too_long_is_given_up(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match=r"not read within 0\.05 seconds"):
        convert_pickle(tmp_path / "a.pt", tmp_path / "new.safetensors", timeout_s=0.05)
    assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []


def test_add_names_the_command(tmp_path, capsys, tiny_base_folder):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "y")
    assert refused.code == 2 and "haori library convert-pickle" in refused.err


def test_other_files_are_refused_in_words(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(FileFormatError, match="it holds a list, not tensors by name"):
        convert_pickle(tmp_path / "list.pt", tmp_path / "new.safetensors")
    with pytest.raises(FileFormatError, match="There is no file"):
        convert_pickle(tmp_path / "none.pt", tmp_path / "new.safetensors")
