"""Stable Diffusion 1 and 2 through our family against the stock pipeline: denoising, encoding, decoding, tokens."""

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.diffusion_pipelines import saved, stable_diffusion

CAPTIONS = ["a red cat", "blue, with a very long tail. " * 6]
PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.fixture(scope="module", params=PREDICTIONS)
def stock(request: Any) -> Any:
    return stable_diffusion(request.param)


@pytest.fixture(scope="module")
def base(stock: Any, tmp_path_factory: Any) -> Any:
    from haori.bases import find_base

    return find_base(str(saved(stock, tmp_path_factory.mktemp("sd") / "tiny")))


def denoised(base: Any, stock: Any, steps: int = 3, size: int = 32) -> Any:
    """Return latents of the loop that the stock pipeline runs without guidance, with our family's parts."""
    import torch

    from haori.bases import load_model
    from haori.bases.diffusion import PipelineProcessor

    model: Any = load_model(base, dtype="fp32", device="cpu")
    processor = PipelineProcessor(base)
    scheduler = copy.deepcopy(stock.scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, size // 4, size // 4, generator=generator) * scheduler.init_noise_sigma
    tokens = {f"tokens_{name}": ids for name, ids in processor.tokens(CAPTIONS).items()}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            times = timestep.expand(2).float()
            predicted = model(scheduler.scale_model_input(latents, timestep), times, **tokens).sample
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def of_stock(stock: Any, size: int = 32) -> Any:
    import torch

    return stock(
        CAPTIONS, num_inference_steps=3, guidance_scale=1.0, output_type="latent", height=size, width=size,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def test_the_loop_of_the_stock_pipeline_with_our_parts_gives_its_latents(base: Any, stock: Any) -> None:
    import torch

    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(denoised(base, stock), of_stock(stock), rtol=1e-5, atol=1e-5)


def test_a_tenth_less_of_the_text_would_be_seen(base: Any, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from haori.bases.diffusion.families.stable_diffusion import StableDiffusion

    embed = StableDiffusion.embed
    monkeypatch.setattr(
        StableDiffusion, "embed", lambda *given: {key: 0.9 * value for key, value in embed(*given).items()}
    )
    apart = (denoised(base, stock) - of_stock(stock)).abs().max()
    assert apart > 1e-4, f"the tolerance is 1e-5, the fault {apart:.1e}"
    assert torch.isfinite(apart)


def test_latents_are_scaled_as_the_stock_img2img_pipeline_has_them(base: Any, stock: Any) -> None:
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline

    from haori.bases.diffusion import PipelineProcessor

    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    processor = PipelineProcessor(base)
    vae = processor.load_vae("fp32", "cpu")
    img2img = StableDiffusionImg2ImgPipeline(**stock.components, requires_safety_checker=False)
    scheduler: Any = img2img.scheduler
    scheduler.set_timesteps(10)
    first = scheduler.timesteps[:1]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        expected = img2img.prepare_latents(pixels, first, 1, 1, torch.float32, "cpu", generator)
        generator = torch.Generator().manual_seed(5)
        ours = processor.family.encode(vae, pixels, generator)
        noise = torch.randn(ours.shape, generator=generator)
        torch.testing.assert_close(processor.noising.add(ours, noise, first), expected, rtol=1e-5, atol=1e-6)
        mean = stock.vae.encode(pixels).latent_dist.mean * stock.vae.config.scaling_factor
        torch.testing.assert_close(processor.family.encode(vae, pixels), mean)
        decoded = stock.vae.decode(mean / stock.vae.config.scaling_factor).sample
        torch.testing.assert_close(processor.family.decode(vae, mean), decoded)


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
