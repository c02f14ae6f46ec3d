"""Image bases held in 8 and 4 bits: the weights against the papers' grids, and adapters that learn over them."""

from pathlib import Path
from typing import Any

import pytest

from haori.core.quantization import Quantization
from tests.diffusion_pipelines import FAMILIES, saved

# The 16 levels of NF4 (Dettmers et al. 2023, appendix E), rounded.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1.0]  # fmt: skip
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Any:
    from haori.bases import find_base

    return find_base(str(saved(FAMILIES["sd15"](), tmp_path_factory.mktemp("sd") / "tiny")))


def loaded(base: Any, quantization: Quantization | None = None) -> Any:
    from haori.bases import load_model

    return load_model(base, dtype="fp32", device="cpu", quantization=quantization)


def prediction(model: Any, states: Any = None) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    noisy, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 24, generator=generator)
    return model(noisy, torch.tensor([500.0]), text_states=states).sample


def test_eight_bits_are_rows_of_steps_of_their_largest_weight(base: Any) -> None:
    import torch

    weight = loaded(base).unet.get_submodule(LAYER).weight
    held = loaded(base, Quantization(8)).unet.get_submodule(LAYER)
    assert held.weight.dtype == torch.int8
    step = weight.abs().amax(1, keepdim=True) / 127
    scale = held.weight.SCB.reshape(-1, 1) / 127
    torch.testing.assert_close(scale, step, rtol=1e-3, atol=0)
    # Half a step, and what fp16, in which bitsandbytes quantises, rounds of a weight of 127 steps.
    assert ((held.weight * scale - weight).abs() <= (0.5 + 127 / 2048) * step + 1e-6).all()


def test_four_bits_are_levels_of_the_largest_weight_of_a_block(base: Any) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    weight = loaded(base).unet.get_submodule(LAYER).weight
    held = loaded(base, Quantization(4, double=False)).unet.get_submodule(LAYER)
    assert held.weight.dtype == torch.uint8
    found = dequantize_4bit(held.weight.data, held.weight.quant_state).float()
    blocks, origin = found.reshape(-1, 64), weight.reshape(-1, 64)
    largest = origin.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (blocks / largest).unsqueeze(-1) - levels
    assert nearest.abs().amin(-1).max() < 2e-3
    expected = levels[((origin / largest).unsqueeze(-1) - levels).abs().argmin(-1)]
    assert ((blocks / largest - expected).abs() < 2e-3).float().mean() > 0.99


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4), Quantization(4, double=False)])
def test_an_adapter_learns_over_a_quantised_base(base: Any, quantization: Quantization) -> None:
    import torch

    from haori.adapters.insertion import Insertion
    from haori.adapters.methods import insert_method
    from haori.bases import resolve_targets, weight_bytes
    from haori.bases.diffusion import PipelineProcessor
    from haori.core.methods import QloraMethod

    plain, model = loaded(base), loaded(base, quantization)
    assert weight_bytes(model) < 0.85 * weight_bytes(plain)
    whole, held = prediction(plain), prediction(model)
    error = (whole - held).norm() / whole.norm()
    assert 1e-5 < error < 0.2
    method = QloraMethod(
        kind="qlora", bits=quantization.bits, double_quantization=quantization.double, rank=2, alpha=2.0
    )
    adapted: Any = insert_method(
        model, PipelineProcessor(base), method, resolve_targets(model, "attention"), Insertion(seed=0, steps=1)
    )
    prediction(adapted).square().mean().backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 32
    assert all(gradient is not None and torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)
    kinds = {type(module).__name__ for module in adapted.modules() if "lora" in type(module).__module__}
    assert any("bit" in kind for kind in kinds), kinds


def test_an_autoencoder_that_overflows_in_fp16_is_loaded_in_fp32(tmp_path: Path) -> None:
    import json

    import torch

    from haori.bases import find_base
    from haori.bases.diffusion import PipelineProcessor

    folder = saved(FAMILIES["sd15"](), tmp_path / "tiny")
    file = folder / "vae" / "config.json"
    for force, expected in ((True, torch.float32), (False, torch.float16)):
        file.write_text(json.dumps({**json.loads(file.read_text()), "force_upcast": force}))
        vae: Any = PipelineProcessor(find_base(str(folder))).load_vae("fp16", "cpu")
        assert vae.dtype == expected
