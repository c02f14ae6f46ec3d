"""The kernels in C against their twins in torch, and both against fp64."""

import pytest
import torch

from haori.adapters.fused.kernels import ACTIVATIONS, NativeKernels, TorchKernels, compiled, kernels_for

pytestmark = pytest.mark.skipif(compiled().library is None, reason=compiled().reason)
TWIN = TorchKernels()
SILU = ACTIVATIONS["silu"]


@pytest.fixture(scope="module")
def native():
    found = kernels_for(torch.zeros(1, dtype=torch.bfloat16))
    assert isinstance(found, NativeKernels)
    return found


def drawn(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def near(found, twin, exact):
    """No farther from the exact result than the twin in torch, which rounds more often, and within bf16's rounding."""
    error, own = ((x.double() - exact).norm() / exact.norm().clamp_min(1e-30) for x in (found, twin))
    assert error <= max(1.05 * float(own), 1e-6), (error, own)
    assert error < 4e-3


@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1, 7), (2, 40, 576), (70, 33)])
def test_rms_norm(native, shape):
    x, grad, weight = drawn(*shape, scale=3), drawn(*shape, seed=1), drawn(shape[-1], seed=2)
    y, inverse = native.rms(x, weight, 1e-5)
    twin, twin_inverse = TWIN.rms(x, weight, 1e-5)
    wide = x.double().requires_grad_()
    exact = weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact.backward(grad.double())
    near(y, twin, exact.detach())
    torch.testing.assert_close(inverse, twin_inverse)
    near(native.rms_back(grad, x, weight, inverse), TWIN.rms_back(grad, x, weight, twin_inverse), wide.grad)


@pytest.mark.parametrize(("batch", "own_angles"), [(3, False), (3, True), (1, False)])
def test_rotation_and_back(native, batch, own_angles):
    x = drawn(batch, 21, 5, 24)
    angles = torch.rand(batch if own_angles else 1, 21, 12) * 6
    cos, sin = (torch.cat([part, part], -1).bfloat16() for part in (angles.cos(), angles.sin()))
    for sign in (1.0, -1.0):
        turned = torch.cat([-x[..., 12:], x[..., :12]], -1).double() * sign
        exact = x.double() * cos.double().unsqueeze(2) + turned * sin.double().unsqueeze(2)
        near(native.rotate(x, cos, sin, sign), TWIN.rotate(x, cos, sin, sign), exact)


@pytest.mark.parametrize("rows", [1, 33, 70])
def test_gate_and_its_gradients(native, rows):
    gate, up, grad = drawn(rows, 45, scale=4), drawn(rows, 45, seed=1), drawn(rows, 45, seed=2)
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.nn.functional.silu(g) * u
    exact.backward(grad.double())
    near(native.gate(gate, up, SILU), TWIN.gate(gate, up, SILU), exact.detach())
    found = native.gate_back(grad.clone(), gate, up, SILU)
    twin = TWIN.gate_back(grad.clone(), gate, up, SILU)
    for one, other, wanted in zip(found, twin, (exact.detach(), g.grad, u.grad), strict=True):
        near(one, other, wanted)


def test_other_activations_are_left_to_torch(native):
    gate, up, grad = (drawn(9, 16, seed=seed) for seed in range(3))
    other = ACTIVATIONS["gelu_tanh"]
    assert torch.equal(native.gate(gate, up, other), TWIN.gate(gate, up, other))
    found, twin = (kernels.gate_back(grad.clone(), gate, up, other) for kernels in (native, TWIN))
    assert all(torch.equal(one, two) for one, two in zip(found, twin, strict=True))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_losses_and_residuals(native, scale):
    logits, targets = drawn(13, 1001, scale=scale), torch.arange(13) * 70 % 1001
    exact = logits.double()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    residuals = torch.softmax(exact, -1) - torch.nn.functional.one_hot(targets, 1001)
    found, twin = logits.clone(), logits.clone()
    losses, twin_losses = torch.empty(13), torch.empty(13)
    native.residuals(found, targets, losses)
    TWIN.residuals(twin, targets, twin_losses)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(twin_losses, losses, rtol=1e-5, atol=1e-5)
    near(found, twin, residuals)


def test_extremes_neither_overflow_nor_become_nan(native):
    gate = torch.tensor([[-3e38, -1e4, -90.0, 0.0, 90.0, 1e4, 3e30, -0.0]]).bfloat16()
    ones = torch.ones_like(gate)
    assert native.gate(gate, ones, SILU)[0].tolist() == pytest.approx([0, 0, 0, 0, 90, 1e4, 3e30, 0], rel=1e-2)
    assert all(torch.isfinite(part).all() for part in native.gate_back(ones.clone(), gate, ones, SILU))
    logits, losses = torch.tensor([[1e30, -1e30, 0.0], [5.0, 5.0, 5.0]]).bfloat16(), torch.empty(2)
    native.residuals(logits, torch.tensor([0, 1]), losses)
    assert losses.tolist() == pytest.approx([0.0, 1.0986123])
    assert logits[0].tolist() == pytest.approx([0, 0, 0])
    assert torch.isnan(native.rms(torch.full((1, 8), float("nan")).bfloat16(), ones[0], 1e-5)[0]).all()


def test_views_and_other_dtypes(native):
    x, weight = drawn(6, 40)[:, ::2], drawn(40, seed=1)[::2]
    y, inverse = native.rms(x, weight, 1e-5)
    torch.testing.assert_close(y, native.rms(x.contiguous(), weight.contiguous(), 1e-5)[0])
    grad = drawn(20, 6, seed=3).T
    assert torch.equal(
        native.rms_back(grad, x, weight, inverse), native.rms_back(grad.contiguous(), x, weight, inverse)
    )
    assert type(kernels_for(x, weight.float())) is TorchKernels


def test_a_thread_that_computes_alone_computes_the_same(native):
    from concurrent.futures import ThreadPoolExecutor

    x, weight = drawn(200, 96), drawn(96, seed=1)
    with ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(1)) as pool:
        alone = pool.submit(native.rms, x, weight, 1e-5).result()
    assert torch.equal(alone[0], native.rms(x, weight, 1e-5)[0])
