"""Values that no trained adapter holds are refused before anything is built, in bounded memory."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from haori.core.errors import FileFormatError
from haori.core.safetensors_header import read_safetensors_header
from haori.library.validation import validate_tensors

_GGUF = Path(__file__).parents[1] / "fixtures/formats/gguf"
_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def ordinary() -> torch.Tensor:
    return torch.randn(8, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_ordinary_values_pass_in_every_dtype(tmp_path, dtype):
    validate_tensors(
        saved(tmp_path / "a.safetensors", a=ordinary().to(dtype), alpha=torch.tensor(9), n=torch.tensor(1e4))
    )
    validate_tensors(_GGUF / "llama_f32.gguf")
    validate_tensors(_GGUF / "llama_q8_0.gguf")


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float32, float("nan"), "'a' in .* holds NaN or infinity"),
        (torch.float16, float("inf"), "'a' in .* holds NaN or infinity"),
        (torch.bfloat16, float("-inf"), "holds NaN or infinity"),
        (torch.float8_e5m2, float("inf"), "holds NaN or infinity"),
        (torch.float64, 1e300, r"holds a value of 1e\+300; more than 65,504"),
        (torch.float32, -70_000.0, r"holds a value of 7e\+04; more than 65,504"),
        (torch.bfloat16, 1e38, "more than 65,504"),
    ],
)
def test_one_bad_value_is_found_wherever_it_is(tmp_path, dtype, value, message):
    for place in (0, 1_300_000, 2_599_999):  # in each of three chunks of fp32, the last one too
        tensor = torch.zeros(2_600_000)
        tensor = tensor.to(dtype)
        tensor[place] = value
        with pytest.raises(FileFormatError, match=message):
            validate_tensors(saved(tmp_path / "a.safetensors", a=tensor, b=ordinary()))


def test_an_absurd_norm_is_refused_and_a_large_one_is_not(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(
        FileFormatError, match=r"have a root mean square of 1,0.*; trained tensors have less than 1,000"
    ):
        validate_tensors(saved(path, a=torch.full((4, 40), 1_050.0)))
    validate_tensors(saved(path, a=torch.full((4, 40), 950.0)))
    with pytest.raises(FileFormatError, match="root mean square"):
        validate_tensors(saved(path, a=torch.cat([torch.zeros(2_000_000), torch.full((200_000,), 5e3)])))


def test_a_scale_of_gguf_that_is_no_number_is_found(tmp_path):
    from haori.library.formats.gguf_header import read_gguf_header

    raw = bytearray((_GGUF / "llama_q8_0.gguf").read_bytes())
    tensor = next(t for t in read_gguf_header(_GGUF / "llama_q8_0.gguf").tensors.values() if t.type == 8)
    raw[tensor.end - 34 : tensor.end - 32] = b"\x00\x7e"  # the scale of its last block
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match="holds NaN or infinity"):
        validate_tensors(tmp_path / "a.gguf")


def test_memory_stays_near_one_chunk(tmp_path):
    import resource

    path = saved(tmp_path / "a.safetensors", a=torch.randn(40_000_000, generator=torch.Generator().manual_seed(0)))
    validate_tensors(saved(tmp_path / "b.safetensors", a=torch.randn(3_000_000)))  # what torch loads once
    statm = Path("/proc/self/statm")
    before, peak = int(statm.read_text().split()[1]), 0

    from haori.library import validation

    real = validation._check

    def watched(*given):
        nonlocal peak
        real(*given)
        peak = max(peak, int(statm.read_text().split()[1]))

    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    validation._check = watched
    try:
        validate_tensors(path)  # 160 MB
    finally:
        validation._check = real
    assert (peak - before) * 4096 < 60e6
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024 < 60e6


def test_bits_that_are_no_numbers_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(FileFormatError, match="is of dtype F8_E8M0, which is no number by itself"):
        validate_tensors(tmp_path / "a.safetensors")


def _file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    other = b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'
    for header, key in (
        (b'{"a":' + entry + b',"a":' + other + b"}", "a"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "dtype"),
        (b'{"__metadata__":{},"__metadata__":{},"a":' + entry + b"}", "__metadata__"),
        (b'{"a":' + entry + rb',"\u0061":' + other + b"}", "a"),
    ):
        with pytest.raises(FileFormatError, match=f"has the key '{key}' twice"):
            read_safetensors_header(_file(tmp_path / "a.safetensors", header, bytes(8)))


@pytest.mark.parametrize("unit", [b"{},", b"[],", b'"a":0,', b"[[[[", b"1e9,", b'"",'])
def test_a_header_that_would_fill_memory_is_refused(tmp_path, unit):
    import resource

    body = unit * ((15 << 20) // len(unit))
    header = b'{"__metadata__":[' + body + b"0]}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileFormatError, match="its header"):
        read_safetensors_header(_file(tmp_path / "a.safetensors", header))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200e6


def test_a_tensor_of_one_large_value_repeated_is_found(tmp_path):
    for value in (70_000.0, -70_000.0):
        with pytest.raises(FileFormatError, match="more than 65,504"):
            validate_tensors(saved(tmp_path / "a.safetensors", a=torch.full((3,), value)))
