"""Adapters whose weights are stored in 8 bits compute what the same numbers in 32 bits do."""

import shutil
from pathlib import Path

import pytest
import torch

from haori.bases import find_base
from haori.library import import_adapter, inspect_adapter
from tests.library_samples import change_tensors, run, stock_logits, stock_lora


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"trainable_token_indices": [5, 9]}])
def test_an_adapter_in_8_bits_is_added_and_attached(tiny_base_folder: Path, tmp_path: Path, dtype, options):
    from haori.library import attach

    folder = stock_lora(tiny_base_folder, tmp_path / "a", **options)
    change_tensors(folder, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    exact = shutil.copytree(folder, tmp_path / "exact")
    change_tensors(exact, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items()}))
    assert {entry.dtype for entry in inspect_adapter(folder).tensors.values()} <= {"F8_E4M3", "F8_E5M2"}
    base = find_base(str(tiny_base_folder))
    stored = import_adapter(folder, base, name="small", dtype="fp32")
    found = run(attach(base, stored.path, dtype="fp32").eval())
    expected = stock_logits(tiny_base_folder, exact)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_nan_in_8_bits_is_found(tiny_base_folder: Path, tmp_path: Path):
    from haori.core.errors import FileFormatError

    folder = stock_lora(tiny_base_folder, tmp_path / "a")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = sorted(tensors)[0]
        tensors[key][0, 0] = float("nan")
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    with pytest.raises(FileFormatError, match="NaN"):
        import_adapter(change_tensors(folder, spoil), find_base(str(tiny_base_folder)), name="broken")
