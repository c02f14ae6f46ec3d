import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from haori.core.errors import FileFormatError
from haori.library import inspect_adapter
from haori.library.adapter_files import OWN_TYPES, PEFT_TYPES
from haori.library.peft_options import PEFT_OPTIONS
from tests.library_samples import stock_logits, stock_lora, written_adapter


def test_known_methods_are_those_of_the_installed_peft():
    from peft import PeftType

    assert {kind.value for kind in PeftType} - OWN_TYPES == PEFT_TYPES


def test_reads_what_stock_peft_wrote(tiny_base_folder, tmp_path):
    folder = stock_lora(
        tiny_base_folder, tmp_path / "a", rank_pattern={"v_proj": 2}, use_rslora=True, modules_to_save=["lm_head"],
        trainable_token_indices=[5, 3],
    )  # fmt: skip
    files = inspect_adapter(folder)
    assert files.ranks["model.layers.0.self_attn.q_proj"] == 4
    assert files.ranks["model.layers.1.self_attn.v_proj"] == 2
    assert (files.rank, files.alpha, files.method) == (4, 8.0, "lora")
    assert files.use_rslora and not files.use_dora
    assert files.modules_to_save == ("lm_head",)
    assert files.trainable_tokens == (3, 5)
    assert files.target_modules == ("q_proj", "v_proj")
    assert files.size_bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_known_options_are_those_of_the_installed_peft():
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import haori.adapters.ard_lora  # noqa: F401 - adds its own

    installed = {
        str(getattr(method, "value", method)): {field.name for field in dataclasses.fields(config)}
        for method, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    assert installed == PEFT_OPTIONS


@pytest.mark.parametrize("value", [0.5, "bar", True, [1], {"a": 1}, 1e999])
def test_an_unknown_option_that_is_set_is_refused_by_name(tmp_path, value):
    folder = written_adapter(tmp_path / "a", frobnicate_factor=value)
    with pytest.raises(FileFormatError, match=r"'frobnicate_factor' to .*an option of LORA that PEFT .* does not know"):
        inspect_adapter(folder)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_option_that_is_empty_sets_nothing(tmp_path, value):
    assert inspect_adapter(written_adapter(tmp_path / "a", frobnicate_factor=value)).rank == 4


def test_an_option_of_another_method_is_unknown(tmp_path):
    with pytest.raises(FileFormatError, match=r"'vera_dropout' .* of LORA"):
        inspect_adapter(written_adapter(tmp_path / "a", vera_dropout=0.5))
    inspect_adapter(written_adapter(tmp_path / "b", peft_type="VERA", vera_dropout=0.5, lora_alpha=None))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_configuration_with_a_byte_order_mark_is_json(tiny_base_folder, tmp_path, encoding):
    from haori.bases import find_base
    from haori.library import Library, import_adapter

    folder = stock_lora(tiny_base_folder, tmp_path / "a")
    expected, path = stock_logits(tiny_base_folder, folder), folder / "adapter_config.json"
    path.write_text(path.read_text(), encoding=encoding)
    stored = import_adapter(folder, find_base(str(tiny_base_folder)), name="marked", dtype="fp32")
    for place in (stored.path, Library().export("marked", tmp_path / "out")):
        assert all(map(torch.equal, stock_logits(tiny_base_folder, place), expected))


def test_adapters_in_folders_of_their_own_are_named(tmp_path):
    for name in ("cook", "poet", "checkpoint-10"):
        written_adapter(tmp_path / "made" / name)
    with pytest.raises(
        FileFormatError, match=r"2 adapters in folders of their own: 'cook', 'poet'; .*such as '.*/cook'"
    ):
        inspect_adapter(tmp_path / "made")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"])
def test_weights_of_a_dtype_that_nothing_reads_are_a_sentence(tmp_path, dtype):
    folder = written_adapter(tmp_path / "a")
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, {"F4": 4, "F8_E8M0": 8}.get(dtype, 6)]}
    raw = json.dumps({"base_model.model.q.lora_A.weight": entry}).encode()
    data = bytes(entry["data_offsets"][1])
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    with pytest.raises(FileFormatError, match=f"dtype {dtype}.*fp32, fp16 or bf16"):
        inspect_adapter(folder)


def test_dora_is_named_so(tiny_base_folder, tmp_path):
    files = inspect_adapter(stock_lora(tiny_base_folder, tmp_path / "a", use_dora=True))
    assert files.method == "dora" and files.use_dora


def test_other_methods_have_no_rank(tmp_path):
    files = inspect_adapter(written_adapter(tmp_path / "a", peft_type="LOHA", alpha=8, lora_alpha=None))
    assert (files.method, files.alpha) == ("loha", 8.0)


def test_nothing_heavy_is_imported(tmp_path):
    written_adapter(tmp_path / "a")
    code = (
        "import sys, pathlib, haori.library as l; "
        "light = not {'torch', 'peft', 'sqlalchemy', 'numpy', 'pydantic'} & set(sys.modules); "
        f"l.inspect_adapter(pathlib.Path({str(tmp_path / 'a')!r})); "
        "assert light and not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _pickle_renamed(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 60)


def _zip_renamed(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 60)


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _header_of_2_gb(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2 << 30) + b"{}")


def _no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")


def _config(text: str):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_pickle_only, "adapter_model.bin, a Python pickle.*haori library convert-pickle"),
        (_pickle_renamed, "it is a Python pickle"),
        (_zip_renamed, "zip archive"),
        (_truncated, "truncated"),
        (_header_of_2_gb, "header claims 2,147,483,648 bytes"),
        (_no_tensors, "holds no tensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (_config("not json"), "not a JSON file"),
        (_config("[" * 100_000), "not a JSON file"),
        (_config("[1]"), "must hold a JSON object"),
        (_config(json.dumps({"peft_type": "LORA", "x": "y" * (1 << 20)})), "at most 1,048,576"),
        (_config('{"peft_type": "lorra"}'), "did you mean 'LORA'"),
        (_config('{"r": 4}'), "'None', which PEFT does not know"),
        (_config('{"peft_type": "XLORA"}'), "mixes other adapters"),
        (_config('{"peft_type": "LORA", "megatron_config": {"a": 1}}'), "'megatron_config'"),
        (_config('{"peft_type": "LORA", "arrow_config": {"top_k": 1}}'), "'arrow_config'"),
    ],
)
def test_refuses_in_one_sentence(tmp_path, spoil, said):
    folder = written_adapter(tmp_path / "a")
    spoil(folder)
    with pytest.raises(FileFormatError, match=said) as caught:
        inspect_adapter(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileFormatError, match="is not a folder"):
        inspect_adapter(tmp_path / "nowhere")
