"""The fused path on a GPU: the same Functions, with torch's own attention kernels; stock PEFT is the oracle."""

import copy
from typing import Any

import pytest
import torch

from haori.adapters.fused import fuse
from tests.parity import test_fused as cpu

pytestmark = pytest.mark.gpu

FAMILIES = ["llama", "llama-tied-bias", "qwen2", "qwen3", "gemma", "mistral-window", "smollm3"]
OPTIONS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"use_rslora": True, "r": 16}]


def run(model: torch.nn.Module, *, fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, in float64 on the CPU."""
    device = next(model.parameters()).device
    ids, mask, labels = (tensor.to(device) for tensor in cpu.shared_batch(4, 20, 9))
    model.zero_grad()
    if fused:
        total, _ = model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    total.backward()
    return total.item(), {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_peft_in_fp32(family: str, options: dict[str, Any], device: str):
    model = cpu.adapted(family, **options).to(device)
    loss, expected = run(model, fused=False)
    report = fuse(model).report
    assert report.fused["loss head"] == 1, report.sentence()
    fused_loss, found = run(model, fused=True)
    assert fused_loss == pytest.approx(loss, rel=1e-4)
    assert cpu.worst(found, expected) < 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_in_bf16_is_as_near_to_fp32_as_peft_is(family: str, options: dict[str, Any], device: str):
    reference = cpu.adapted(family, **options)
    rounded = cpu.adapted(family, torch.bfloat16, **options)
    rounded.load_state_dict(reference.state_dict())
    exact = copy.deepcopy(rounded).float()  # the very values that bf16 holds
    _, expected = run(exact, fused=False)
    rounded.to(device)
    _, stock = run(rounded, fused=False)
    fuse(rounded)
    _, found = run(rounded, fused=True)
    assert cpu.worst(found, expected) < max(1.5 * cpu.worst(stock, expected), 0.05)
