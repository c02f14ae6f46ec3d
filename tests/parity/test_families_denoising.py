"""Every family of image bases against its stock pipeline: the same loop with our parts gives the same latents.

The stock pipeline runs as it is, without guidance; its noise and scheduler are used again, and everything between
(tokens, text states, packing, ids, timesteps, the denoiser's arguments) comes from the family.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diffusion_pipelines import FAMILIES, flux1, saved, stable_diffusion

CAPTIONS = ["a red cat", "blue, with a very long tail. " * 3]
WIDTH, HEIGHT = 48, 32
STEPS = 3
PIPELINES: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "sd15 of velocity": lambda: stable_diffusion("v_prediction"),
    "flux1 schnell": lambda: flux1(guided=False),
}
# What the stock pipeline is called with so that it runs once per step; guidance 1 is what an adapter is trained at.
CALLS: dict[str, dict[str, Any]] = {
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {},
    "flux1 schnell": {"max_sequence_length": 256},
}


class Stock:
    """A stock pipeline, the base it is saved as, and what its denoising saw: timesteps, noise, final latents."""

    def __init__(self, kind: str, folder: Path) -> None:
        import torch

        from haori.bases import find_base

        self.pipeline = PIPELINES[kind]()
        self.base = find_base(str(saved(self.pipeline, folder / "tiny")))
        self.pipeline.set_progress_bar_config(disable=True)
        self.start: Any = None
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        step = self.pipeline.scheduler.step

        def first_latents(prediction: Any, timestep: Any, latents: Any, **options: Any) -> Any:
            if self.start is None:
                self.start, self.timesteps = latents.clone(), self.pipeline.scheduler.timesteps.clone()
            return step(prediction, timestep, latents, **options)

        self.pipeline.scheduler.step = first_latents
        options = {"guidance_scale": 1.0} if kind not in CALLS or kind == "flux1 schnell" else {}
        self.latents = self.pipeline(
            prompt=list(CAPTIONS), num_inference_steps=STEPS, output_type="latent", width=WIDTH, height=HEIGHT,
            generator=torch.Generator().manual_seed(0), **{**options, **CALLS.get(kind, {})},
        ).images  # fmt: skip
        self.scheduler = self.pipeline.scheduler
        self.scheduler.step = step
        self.fresh = scheduler


@pytest.fixture(scope="module", params=PIPELINES)
def stock(request: Any, tmp_path_factory: Any) -> Iterator[Stock]:
    yield Stock(request.param, tmp_path_factory.mktemp("family"))


def unpacked(stock: Stock, latents: Any) -> Any:
    """Return latents of the stock pipeline as [B, C, h, w] of the family, by the pipeline's own functions."""
    pipe, name = stock.pipeline, type(stock.pipeline).__name__
    if name == "FluxPipeline":
        return pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor)
    if name == "QwenImagePipeline":
        return pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor).squeeze(2)
    if name == "Flux2KleinPipeline" and latents.dim() == 3:
        rows, columns = HEIGHT // pipe.vae_scale_factor // 2, WIDTH // pipe.vae_scale_factor // 2
        return latents.transpose(1, 2).reshape(len(latents), -1, rows, columns)
    if name == "Flux2KleinPipeline":
        # Its finished latents are those of the autoencoder; the family's are squares, normalised.
        squares = pipe._patchify_latents(latents)
        norm = pipe.vae.bn
        mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return (squares - mean) / (variance + pipe.vae.config.batch_norm_eps).sqrt()
    return latents


def denoised(stock: Stock) -> Any:
    """Run the loop of the stock pipeline with our family's parts, from its own noise."""
    import torch

    from haori.bases import load_model
    from haori.bases.diffusion import PictureSize, PipelineProcessor

    model: Any = load_model(stock.base, dtype="fp32", device="cpu")
    processor = PipelineProcessor(stock.base)
    scheduler: Any = stock.scheduler
    scheduler._step_index = None  # begin again on the same timesteps
    latents = unpacked(stock, stock.start)
    given = {f"tokens_{name}": ids for name, ids in processor.tokens(CAPTIONS).items()}
    size = PictureSize(original=(HEIGHT, WIDTH), crop=(0, 0), target=(HEIGHT, WIDTH))
    given |= processor.family.sizes([size] * 2)
    with torch.no_grad():
        for timestep in stock.timesteps:
            scaled = (
                scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
            )
            predicted = model(scaled, timestep.expand(2).float(), **given).sample
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def test_the_loop_of_the_stock_pipeline_with_our_parts_gives_its_latents(stock: Stock) -> None:
    import torch

    expected = unpacked(stock, stock.latents)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(denoised(stock), expected, rtol=1e-4, atol=2e-5)


def faults(stock: Stock) -> dict[str, Callable[[Any], Any]]:
    """Return planted faults by name: each takes the family's `predict` and gives one with a fault."""
    import torch

    def tenth(key: str) -> Callable[[Any], Any]:
        def fault(predict: Any) -> Any:
            # Mixed rather than scaled: a norm behind it would undo a scale.
            return lambda denoiser, noisy, times, given: predict(
                denoiser, noisy, times, {**given, key: given[key] + 0.1 * given[key].flip(-1)}
            )

        return fault

    def turned(predict: Any) -> Any:
        def run(denoiser: Any, noisy: Any, times: Any, given: Any) -> Any:
            return predict(denoiser, noisy.transpose(2, 3), times, given).transpose(2, 3)

        return run

    def guided(predict: Any) -> Any:
        return lambda denoiser, noisy, times, given: predict(
            denoiser, noisy, times, {**given, "guidance": torch.full((len(noisy),), 1.1)}
        )

    def late(predict: Any) -> Any:
        return lambda denoiser, noisy, times, given: predict(denoiser, noisy, times * 0.9, given)

    found = {"a tenth of the text": tenth("text_states"), "rows for columns": turned, "a tenth of the time": late}
    if type(stock.pipeline).__name__ == "FluxPipeline":
        found["a tenth of the summary"] = tenth("pooled")
        if stock.pipeline.transformer.config.guidance_embeds:
            found["a tenth of the guidance"] = guided
    if type(stock.pipeline).__name__ == "StableDiffusionXLPipeline":
        found |= {"a tenth of the summary": tenth("pooled"), "a tenth of the second text": tenth("text_states_2")}
        found["a tenth of the sizes"] = tenth("time_ids")
    return found


def test_a_fault_of_a_tenth_is_seen(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    from haori.bases.diffusion.families import family_of

    expected, kind = unpacked(stock, stock.latents), type(family_of(stock.base))
    predict = kind.predict
    for name, fault in faults(stock).items():

        def faulty(family: Any, *given: Any, fault: Any = fault) -> Any:
            return fault(lambda *arguments: predict(family, *arguments))(*given)

        monkeypatch.setattr(kind, "predict", faulty)
        apart = (denoised(stock) - expected).abs().max()
        assert apart > 1e-4, f"{name}: {apart:.1e}, where the tolerance is 2e-5"


def pixels() -> Any:
    import torch

    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) * 2 - 1


IMG2IMG = {
    "StableDiffusionPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLImg2ImgPipeline",
    "FluxPipeline": "FluxImg2ImgPipeline",
    "ZImagePipeline": "ZImageImg2ImgPipeline",
    "QwenImagePipeline": "QwenImageImg2ImgPipeline",
}


def of_stock(stock: Stock, pictures: Any) -> Any:
    """Return the latents that the stock pipeline makes of pictures, by its own code, drawn with seed 5."""
    import diffusers
    import torch

    name, pipe = type(stock.pipeline).__name__, stock.pipeline
    generator = torch.Generator().manual_seed(5)
    if name == "Flux2KleinPipeline":
        return pipe._encode_vae_image(pictures, generator)
    if name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        parts: dict[str, Any] = dict(pipe.components)
        extra: dict[str, Any] = {"requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
        img2img: Any = getattr(diffusers, IMG2IMG[name])(**parts, **extra)
        img2img.scheduler = NoNoise()
        extra = {"add_noise": False} if name == "StableDiffusionXLPipeline" else {}
        return img2img.prepare_latents(pictures, torch.tensor([1]), 2, 1, torch.float32, "cpu", generator, **extra)
    kind: Any = getattr(diffusers, IMG2IMG[name])
    img2img = kind(**pipe.components)
    if name == "ZImagePipeline":
        img2img.scheduler = NoNoise()
        return img2img.prepare_latents(
            pictures, torch.tensor([1.0]), 2, 4, HEIGHT, WIDTH, torch.float32, "cpu", generator
        )
    found = img2img._encode_vae_image(pictures.unsqueeze(2) if name == "QwenImagePipeline" else pictures, generator)
    return found.squeeze(2) if found.dim() == 5 else found


class NoNoise:
    """A scheduler that leaves latents as they are, so that they can be looked at."""

    def add_noise(self, latents: Any, noise: Any, timestep: Any) -> Any:
        return latents

    def scale_noise(self, latents: Any, timestep: Any, noise: Any) -> Any:
        return latents


def test_latents_are_those_of_the_stock_img2img_pipeline(stock: Stock) -> None:
    import torch

    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(stock.base)
    vae = processor.load_vae("fp32", "cpu")
    with torch.no_grad():
        expected = of_stock(stock, pixels())
        if type(stock.pipeline).__name__ == "Flux2KleinPipeline":
            ours = processor.family.encode(vae, pixels())  # the stock one takes the mean
        else:
            ours = processor.family.encode(vae, pixels(), torch.Generator().manual_seed(5))
        factor = processor.family.latent_factor
        assert ours.shape == (2, processor.family.latent_channels, HEIGHT // factor, WIDTH // factor)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_decoding_is_that_of_the_stock_pipeline(stock: Stock) -> None:
    import torch

    from haori.bases.diffusion import PipelineProcessor

    processor = PipelineProcessor(stock.base)
    vae = processor.load_vae("fp32", "cpu")
    name = type(stock.pipeline).__name__
    options = {"guidance_scale": 0.0 if name == "ZImagePipeline" else 1.0} if name != "QwenImagePipeline" else {}
    if name == "FluxPipeline":
        options["max_sequence_length"] = 512 if stock.pipeline.transformer.config.guidance_embeds else 256
    picture = stock.pipeline(
        prompt=list(CAPTIONS), num_inference_steps=STEPS, output_type="pt", width=WIDTH, height=HEIGHT,
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip
    with torch.no_grad():
        ours = processor.family.decode(vae, unpacked(stock, stock.latents))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), picture, rtol=1e-4, atol=1e-5)
