"""The kernels in C against their twins in torch."""

import pytest
import torch

from haori.serve.kernels import TorchKernels
from haori.serve.multi_lora import _Part, _places
from haori.serve.native.calls import native_kernels
from haori.serve.native.compilation import compiled
from haori.serve.native.weights import NativeInt4Weight, NativeInt8Weight
from haori.serve.weight import Int4Weight, Int8Weight, pack_weight, to_int4, to_int8

pytestmark = pytest.mark.skipif(native_kernels() is None, reason=compiled().reason)


def arena(slots, width, ranks, outputs):
    """A and the B of each module as an arena holds them: a slot is one stretch of memory."""
    sizes = [width * sum(ranks), *(rank * out for rank, out in zip(ranks, outputs, strict=True))]
    memory = (torch.randn(slots * sum(sizes) + 64) * 0.1).bfloat16()
    held = memory[: slots * sum(sizes)].view(slots, -1)
    a, *bs = (
        part.unflatten(1, shape)
        for part, shape in zip(
            held.split(sizes, 1), [(width, sum(ranks)), *zip(ranks, outputs, strict=True)], strict=True
        )
    )
    b, low, left = [], 0, 0
    for rank, out, outer in zip(ranks, outputs, bs, strict=True):
        b.append((low, low + rank, left, left + out, outer))
        low, left = low + rank, left + out
    return a, tuple(b)


@pytest.mark.parametrize("ranks", [(1,), (4,), (8, 8), (16,), (16, 16, 16), (20, 3), (64,), (50, 64)])
@pytest.mark.parametrize(("width", "outputs"), [(96, (64, 32, 80)), (37, (5, 64, 130))])
def test_updates_of_many_adapters_on_many_rows(ranks, width, outputs):
    torch.manual_seed(0)
    outputs = outputs[: len(ranks)]
    a, b = arena(5, width, ranks, outputs)
    parts = [
        _Part(3, 1.0, 0, 1), _Part(0, 1.0, 1, 10), _Part(4, 0.5, 2, 4), _Part(1, -2.0, 10, 12), _Part(3, 0.25, 12, 13),
        _Part(0, 0.7, 12, 13), _Part(1, 0.1, 12, 13),
    ]  # fmt: skip
    places = _places(parts, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(15, width).bfloat16()  # rows 13 and 14 are the base's
    y = torch.randn(15, sum(outputs)).bfloat16()
    exact = y.float()
    for slot, strength, start, stop in parts:
        t = x[start:stop].float() @ a[slot].float()
        for low, high, left, right, outer in b:
            exact[start:stop, left:right] += strength * t[:, low:high] @ outer[slot].float()
    for kernels in (native_kernels(), TorchKernels()):
        found = y.clone()
        kernels.update(places, a, b, x, found)
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
