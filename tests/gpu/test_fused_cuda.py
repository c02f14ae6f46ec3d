"""The fused path on a GPU: the same Functions, with torch's own attention kernels."""

import pytest
import torch

from haori.adapters.fused import fuse
from tests.parity import test_fused as cpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "r": 16}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_fused_equals_peft_on_a_gpu(family: str, options: dict[str, object]):
    model = cpu.adapted(family, **options).cuda()
    ids, mask, labels = (tensor.cuda() for tensor in cpu.shared_batch(4, 20, 9))

    def run(*, fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        if fused:
            total, _ = model(input_ids=ids, attention_mask=mask, use_cache=False, head_targets=labels[:, 1:])
        else:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total.backward()
        return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, expected = run(fused=False)
    assert fuse(model).report.fused["attention blocks"] == cpu.LAYERS
    fused_loss, found = run(fused=True)
    assert fused_loss == pytest.approx(loss, rel=1e-4)
    assert cpu.worst(found, expected) < 1e-3
