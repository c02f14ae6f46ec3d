"""The stock pipeline with live modules in it, and what tells Stable Diffusion 2 from 1."""

from pathlib import Path
from typing import Any

import pytest

from tests.diffusion_pipelines import saved, stable_diffusion

CAPTIONS = ["a red cat", "blue, with a very long tail. " * 6]


@pytest.fixture(scope="module")
def stock() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def base(stock: Any, tmp_path_factory: Any) -> Any:
    from haori.bases import find_base

    return find_base(str(saved(stock, tmp_path_factory.mktemp("sd") / "tiny")))


def of_stock(stock: Any, size: int = 32) -> Any:
    import torch

    return stock(
        CAPTIONS, num_inference_steps=3, guidance_scale=1.0, output_type="latent", height=size, width=size,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def test_the_stock_pipeline_takes_live_modules(base: Any, stock: Any) -> None:
    import torch

    from haori.bases import load_model
    from haori.bases.diffusion import pipeline_of

    model: Any = load_model(base, dtype="fp32", device="cpu", components=("unet",))
    made: Any = pipeline_of(base, {"unet": model.unet}, dtype="fp32", device="cpu")
    assert made.unet is model.unet
    torch.testing.assert_close(of_stock(made), of_stock(stock))
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1.1)
    assert (of_stock(made) - of_stock(stock)).abs().max() > 1e-4


def test_the_width_of_the_context_tells_the_second_from_the_first(tmp_path: Path) -> None:
    from haori.bases.diffusion.configs import Part, PipelineConfigs
    from haori.bases.diffusion.families.stable_diffusion import StableDiffusion

    def of(width: int) -> StableDiffusion:
        config = {"cross_attention_dim": width, "sample_size": 96}
        parts = {name: Part("diffusers", "X", tmp_path, {}) for name in ("vae", "text_encoder", "tokenizer")}
        unet = Part("diffusers", "UNet2DConditionModel", tmp_path, config)
        return StableDiffusion(PipelineConfigs("x", "StableDiffusionPipeline", {}, {**parts, "unet": unet}))

    assert [of(width).name for width in (768, 1024, 256)] == ["sd15", "sd2", "sd15"]
    assert (of(1024).native_size, of(1024).size_multiple) == (768, 8)
