"""The loop on a GPU in each precision: it learns, what it saves is what was trained, and a resumed run ends alike."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from haori.bases import find_base, load_model
from haori.core.quantization import Quantization
from haori.training.checkpoint import checkpoints_of
from haori.training.loop import Loop
from haori.training.memory import current_memory_bytes, peak_memory_bytes
from haori.training.signals import StopRequest
from tests.training_samples import make_loop, recipe, rows

pytestmark = pytest.mark.gpu

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def loop_on(device: str, dtype: str, base: Path, folder: Path, done: int = 0) -> Loop:
    if device == "cpu" and dtype == "fp16":
        pytest.skip("Accelerate has fp16 on a GPU only")
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=PRECISIONS[dtype])
    made = recipe("training.save_every=2", "method.dropout=0.1", "optimizer.lr=2e-2")
    return make_loop(base, folder, made, rows(40), rows(10, seed=1), done, accelerator)


def trained(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in loop.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_training_learns_and_a_resumed_run_ends_alike(dtype: str, device: str, tiny_base_folder: Path, tmp_path: Path):
    whole = loop_on(device, dtype, tiny_base_folder, tmp_path / "whole")
    whole.run(StopRequest())
    validation = [line["loss"] for line in whole.measurements.series("validation")]
    assert validation[-1] < validation[0] - 0.3

    class StopAt(StopRequest):
        def __bool__(self) -> bool:
            return first.position.step >= 5

    first = loop_on(device, dtype, tiny_base_folder, tmp_path / "part")
    first.run(StopAt())
    again = loop_on(device, dtype, tiny_base_folder, tmp_path / "part", 5)
    again.run(StopRequest(), again.restore(checkpoints_of(tmp_path / "part")[-1]))
    expected = trained(whole)
    for name, tensor in trained(again).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_computes_nearly_what_the_whole_one_does(
    bits: Literal[4, 8], device: str, tiny_base_folder: Path
):
    pytest.importorskip("bitsandbytes")
    base = find_base(str(tiny_base_folder))
    ids = torch.arange(5, 45)[None].to(device)
    whole = load_model(base, dtype="bf16", device=device)
    small = load_model(base, dtype="bf16", device=device, quantization=Quantization(bits))
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits.float() for model in (whole, small))
    difference = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < difference < 0.5  # 0 would mean that nothing was quantised


def test_memory_is_the_devices(device: str):
    before = current_memory_bytes(device)
    held = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    assert current_memory_bytes(device) - before >= 60 << 20
    assert peak_memory_bytes(device) >= current_memory_bytes(device) - (1 << 20)
    del held
