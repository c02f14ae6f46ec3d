"""The kernels in C against their twins in torch."""

import pytest
import torch

from haori.serve.adapters.multi_lora import _group_rows, _Span
from haori.serve.adapters.packed import PackedBank, Site
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.kernels.native import compiled, native_kernels
from haori.serve.kernels.native_weights import NativeInt4Weight, NativeInt8Weight
from haori.serve.kernels.quantisation import to_int4, to_int8
from haori.serve.kernels.torch_kernels import TorchKernels
from haori.serve.models.weight import Int4Weight, Int8Weight, pack_weight

pytestmark = pytest.mark.skipif(native_kernels() is None, reason=compiled().reason)


@pytest.mark.parametrize("ranks", [(1,), (4,), (8, 8), (16,), (16, 0, 16), (20, 3), (64,), (50, 64)])
@pytest.mark.parametrize(("width", "outputs"), [(96, (64, 32, 80)), (37, (5, 64, 130))])
def test_updates_of_many_adapters_on_many_rows(ranks, width, outputs):
    torch.manual_seed(0)
    outputs = outputs[: len(ranks)]
    site = Site(tuple(f"m{i}" for i in range(len(ranks))), width, outputs)
    bank, adapters = PackedBank([site], (), (), torch.bfloat16, torch.device("cpu")), []
    for number in range(4):
        updates = {
            name: ModuleUpdate((torch.randn(rank, width) * 0.1).bfloat16(), (torch.randn(rank, out) * 0.1).bfloat16())
            for name, rank, out in zip(site.modules, ranks, outputs, strict=True)
            if rank
        }
        weights = AdapterWeights(f"a{number}", updates, {}, {}, 0)
        adapters.append((weights, bank.prepare(weights)))
    assert len({packed.layout for _, packed in adapters}) == 1
    chosen = [(3, 1.0, 0, 1), (0, 1.0, 1, 10), (2, 0.5, 2, 4), (1, -2.0, 10, 12), (3, 0.25, 12, 13), (0, 0.7, 12, 13)]
    groups = _group_rows([_Span(adapters[n][1], *rest) for n, *rest in chosen], torch.device("cpu"))
    x = torch.randn(15, width).bfloat16()  # rows 13 and 14 are the base's
    y = torch.randn(15, sum(outputs)).bfloat16()
    exact = y.float()
    for number, strength, start, stop in chosen:
        left = 0
        for name, out in zip(site.modules, outputs, strict=True):
            if update := adapters[number][0].updates.get(name):
                change = x[start:stop].float() @ update.a.float().T @ update.b.float()
                exact[start:stop, left : left + out] += strength * change
            left += out
    for kernels in (native_kernels(), TorchKernels()):
        found = y.clone()
        kernels.update(groups, 0, adapters[0][1].layout.sites[0], x, found)
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.03)
        assert torch.equal(found[13:], y[13:])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize(("out", "width"), [(16, 32), (48, 96), (64, 576), (20, 37)])
def test_eight_bits(out, width, rows):
    torch.manual_seed(0)
    weight, x = torch.randn(out, width), torch.randn(rows, width).bfloat16()
    rounded, scale = to_int8(weight)
    found = pack_weight(weight, "int8")
    assert isinstance(found, NativeInt8Weight)
    exact = x.float() @ (rounded.float() * scale[:, None]).T
    torch.testing.assert_close(found(x).float(), exact, rtol=0.01, atol=0.02 * width**0.5)
    torch.testing.assert_close(Int8Weight(weight)(x).float(), exact, rtol=0.02, atol=0.02 * width**0.5)
    assert (exact - x.float() @ weight.T).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
@pytest.mark.parametrize(("out", "width"), [(16, 32), (48, 96), (64, 576)])
def test_four_bits(out, width, rows):
    torch.manual_seed(0)
    weight, x = torch.randn(out, width), torch.randn(rows, width).bfloat16()
    levels, step, low = to_int4(weight)
    found = pack_weight(weight, "int4")
    assert isinstance(found, NativeInt4Weight)
    spread = [part.repeat_interleave(32, 1) for part in (step, low)]
    exact = x.float() @ (levels.float() * spread[0] + spread[1]).T
    for product in (found, Int4Weight(weight)):  # steps and lowest values are kept in 16 bits
        assert (product(x).float() - exact).norm() < 0.01 * exact.norm()
    assert (exact - x.float() @ weight.T).norm() < 0.12 * exact.norm()
