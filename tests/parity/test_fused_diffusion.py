"""The fused path on UNets against stock PEFT and diffusers: losses and gradients of every factor must be the same."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import group_norm, mse_loss, scaled_dot_product_attention, silu

from haori.adapters.fused import fuse
from haori.adapters.fused.attention import full_attention
from haori.adapters.fused.diffusion import convolution, kernels
from haori.adapters.fused.diffusion.convolution import Convolution

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"]
WHOLE = {"residual blocks", "picture transformers", "attention blocks", "MLPs"}


SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 12, "attention_head_dim": 2},
    "shifted": {"cross_attention_dim": 12, "attention_head_dim": 2, "resnet_time_scale_shift": "scale_shift"},
    "sdxl": {
        "cross_attention_dim": 20, "attention_head_dim": (1, 2), "transformer_layers_per_block": 2,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 36,
    },
}  # fmt: skip


def unet_of(family: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **SHAPES[family],
    )  # fmt: skip


def adapted(family: str, dtype: torch.dtype = torch.float32, targets: list[str] = ATTENTION, **options: Any) -> Any:
    """Stock PEFT on a tiny UNet, with B drawn at random, so that every gradient matters."""
    unet = unet_of(family).to(dtype)
    settings = {"r": 4, "lora_alpha": 8} | options
    model = get_peft_model(unet, LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model.train()


def inputs(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    width = 20 if family == "sdxl" else 12
    given = {
        "sample": torch.randn(2, 4, 8, 16, generator=generator),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 5, width, generator=generator),
    }
    if family == "sdxl":
        added = {"text_embeds": torch.randn(2, 12, generator=generator), "time_ids": torch.ones(2, 6)}
        given["added_cond_kwargs"] = added
    return given


def gradients(model: Any, family: str) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    dtype = model.base_model.model.dtype
    given = inputs(family)
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    if "added_cond_kwargs" in given:
        given["added_cond_kwargs"] = {k: v.to(dtype) for k, v in given["added_cond_kwargs"].items()}
    found = model(**given, return_dict=False)[0].float()
    loss = mse_loss(found, torch.linspace(-1, 1, found.numel()).view(found.shape))
    loss.backward()
    return loss.item(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    return max(
        float((found[n] - g).detach().norm()) / max(float(g.norm()), 1e-3 * largest) for n, g in expected.items()
    )


def assert_same(model: PeftModel, family: str, whole: set[str] = WHOLE) -> None:
    stock_loss, stock = gradients(model, family)
    fused = fuse(model)
    report = fused.report
    assert {kind for kind, count in report.found.items() if 0 < count == report.fused[kind]} >= whole, report.sentence()
    loss, found = gradients(model, family)
    assert loss == pytest.approx(stock_loss, rel=2e-6)
    assert worst(found, stock) < 2e-4
    fused.remove()
    again_loss, again = gradients(model, family)
    assert again_loss == stock_loss
    assert all(torch.equal(again[n], g) for n, g in stock.items())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_unets_run_whole_and_equal_peft(family: str, targets: list[str]):
    assert_same(adapted(family, targets=targets), family)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 1},
        {"r": 16, "use_rslora": True},
        {"use_dora": True},
        {"targets": ["to_v", "conv2", "time_emb_proj"], "r": 2},
        {"targets": [*EVERYTHING, "conv", "conv_in", "conv_out"], "rank_pattern": {"conv1": 2}},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items())[:40],
)
def test_options_equal_peft(options: dict[str, Any]):
    assert_same(adapted("sd15", **options), "sd15")


def test_adapted_time_steps_equal_peft():
    assert_same(adapted("shifted", targets=["time_emb_proj", "conv1"]), "shifted")


def test_recomputed_blocks_equal_peft():
    model = adapted("sd15", targets=EVERYTHING)
    model.base_model.model.enable_gradient_checkpointing()
    assert_same(model, "sd15")


@pytest.mark.parametrize("family", ["shifted", "sdxl"])
@pytest.mark.parametrize("masters", [False, True], ids=["bf16 factors", "fp32 factors, autocast"])
def test_bf16_is_as_close_to_fp32_as_stock_code(family: str, masters: bool):
    exact = gradients(adapted(family, targets=EVERYTHING), family)[1]
    model = adapted(family, torch.bfloat16, EVERYTHING)
    for name, parameter in model.named_parameters():
        if "lora" in name and masters:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=masters):
        stock = gradients(model, family)[1]
    report = fuse(model).report
    assert all(report.fused[kind] == report.found[kind] for kind in WHOLE), report.sentence()
    with torch.autocast("cpu", torch.bfloat16, enabled=masters):
        found = gradients(model, family)[1]
    assert mean_error(found, exact) < 1.2 * mean_error(stock, exact)


def mean_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return sum(float((found[n] - g).detach().norm() / g.norm().clamp_min(1e-12)) for n, g in expected.items()) / len(
        expected
    )


def test_a_convolution_that_is_off_by_a_tenth_is_found(monkeypatch: pytest.MonkeyPatch):
    model = adapted("sd15", targets=["conv1", "conv2"])
    stock = gradients(model, "sd15")[1]
    monkeypatch.setattr(Convolution, "scale", property(lambda self: 1.1 * float(self.adapted.scaling["default"])))
    fused = fuse(model)
    assert fused.report.fused["residual blocks"] == 0  # in its trial already
    assert "differs from it" in fused.report.sentence()
    assert worst(gradients(model, "sd15")[1], stock) > 0.02  # of the lone convolutions, which have no trial


def change(model: Any, what: str) -> None:
    unet = model.base_model.model
    if what == "sliced attention":
        unet.set_attn_processor(SlicedAttnProcessor(2))
    elif what == "dropout":
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    else:
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.requires_grad_(True)


@pytest.mark.parametrize(
    ("what", "kind", "reason"),
    [
        ("sliced attention", "attention blocks", "it computes by SlicedAttnProcessor"),
        ("dropout", "MLPs", "it has dropout"),
        ("trained norms", "residual blocks", "its own norms are trained"),
    ],
)
def test_what_is_not_known_runs_as_it_is_and_is_named(what: str, kind: str, reason: str):
    model = adapted("sd15")
    change(model, what)
    report = fuse(model).report
    assert report.fused[kind] == 0
    assert f"{kind}: {reason}" in report.sentence()
    assert report.fused["linear layers"] == report.found["linear layers"]


def test_eager_attention_and_switched_off_adapters_equal_stock_code():
    model = adapted("sd15")
    model.base_model.model.set_attn_processor(AttnProcessor())
    assert_same(model, "sd15")
    given = inputs("sd15")
    with torch.no_grad(), model.disable_adapter():
        expected = model(**given).sample
        fused = fuse(model)
        assert torch.allclose(model(**given).sample, expected, atol=1e-5)
    fused.remove()


@pytest.mark.parametrize(("rows", "keys"), [(1, 3), (40, 40), (200, 77), (300, 600)])
def test_full_attention_equals_the_formula(rows: int, keys: int):
    generator = torch.Generator().manual_seed(5)
    q, grad = (torch.randn(2, rows, 6, 8, generator=generator) for _ in range(2))
    k, v = (torch.randn(2, keys, 3, 8, generator=generator) for _ in range(2))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    wide = [exact[0], *(t.repeat_interleave(2, 2) for t in exact[1:])]
    expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in wide), scale=0.3).transpose(1, 2)
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    found = full_attention(*ours, 0.3)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    of_ours = torch.autograd.grad(found, ours, grad)
    of_exact = torch.autograd.grad(expected, exact, grad.double())
    assert all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(of_ours, of_exact, strict=True))


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize(("places", "channels", "groups"), [(1, 8, 4), (35, 24, 3), (64, 320, 32), (9, 40, 1)])
def test_group_norm_equals_the_formula(places: int, channels: int, groups: int, activate: bool):
    generator = torch.Generator().manual_seed(6)
    x, grad = (torch.randn(3, places, channels, generator=generator).bfloat16() for _ in range(2))
    x = x + 3  # a mean that variance must not drown in
    weight, bias = (torch.randn(3, channels, generator=generator) for _ in range(2))
    exact = x.double().requires_grad_()
    y = group_norm(exact.transpose(1, 2), groups, eps=1e-5).transpose(1, 2)
    y = y * weight.double().unsqueeze(1) + bias.double().unsqueeze(1)
    y = silu(y) if activate else y
    (dx,) = torch.autograd.grad(y, exact, grad.double())
    for of in (kernels.kernels_for(x), kernels.TorchKernels()):
        found, mean, inverse = of.group_norm(x, weight, bias, groups, 1e-5, activate=activate)
        back = of.group_norm_back(grad, x, weight, bias, mean, inverse, groups, activate=activate)
        assert float((found - y).detach().norm() / y.detach().norm()) < 4e-3
        assert float((back - dx).norm()) < 4e-3 * float(dx.norm()) + 1e-2 * (places * channels == groups * 2)


def test_geglu_equals_the_formula():
    both = torch.linspace(-9, 9, 40 * 34).view(40, 34).bfloat16()
    grad = torch.linspace(1, -2, 40 * 17).view(40, 17).bfloat16()
    exact = both.double().requires_grad_()
    left, right = exact.chunk(2, -1)
    expected = left * right * torch.special.ndtr(right)
    (d,) = torch.autograd.grad(expected, exact, grad.double())
    for of in (kernels.kernels_for(both), kernels.TorchKernels()):
        assert torch.allclose(of.geglu(both).double(), expected.detach(), rtol=1e-2, atol=1e-4)
        assert torch.allclose(of.geglu_back(grad, both).double(), d, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_convolutions_equal_stock_ones_at_every_size(packed: bool, stride: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolution, "_PACKED_ROWS", 10**6 if packed else 0)
    torch.manual_seed(7)
    layer = nn.Conv2d(24, 16, 3, stride=stride, padding=1).bfloat16().requires_grad_(False)
    ours = Convolution(layer)
    for round_ in range(2):
        for size in ((4, 4), (6, 10)):
            x = torch.randn(2, 24, *size).bfloat16().requires_grad_()
            exact = x.detach().double().requires_grad_()
            expected = copy.deepcopy(layer).double()(exact)
            found = ours(x)
            assert float((found - expected).detach().norm() / expected.detach().norm()) < 4e-3
            grad = torch.randn(expected.shape).bfloat16()
            (dx,) = torch.autograd.grad(expected, exact, grad.double())
            assert float((torch.autograd.grad(found, x, grad)[0] - dx).norm() / dx.norm()) < 4e-3
        assert bool(ours.packed) == packed
        if round_ == 0:
            with torch.no_grad():
                layer.weight.mul_(-0.5)  # what is kept of the weight must not outlive it
