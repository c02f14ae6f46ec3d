"""Pictures of tiny pipelines of several families, against diffusers' own pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from haori.bases import find_base
from haori.bases.quiet import quiet_diffusers
from haori.core.errors import InputError
from haori.images.generation import PictureGenerator
from haori.images.request import PictureRequest
from tests import diffusion_pipelines

SIDE = 32


def values(image: Any) -> Any:
    return np.asarray(image).astype(int)


def stock(folder: Path, kind: str = "DiffusionPipeline") -> Any:
    import diffusers

    with quiet_diffusers():
        pipe = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(prompt: str, **options: Any) -> PictureRequest:
    return PictureRequest(prompt, **{"seed": 3, "steps": 2, "width": SIDE, "height": SIDE, **options})


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "flux1", "qwen_image"])
def test_each_family_draws_as_its_own_pipeline(family, tmp_path):
    folder = diffusion_pipelines.saved(getattr(diffusion_pipelines, family)(), tmp_path / family)
    generator = PictureGenerator(find_base(str(folder)))
    drawn = generator.draw([ask("a red cat")])[0]
    with quiet_diffusers():
        expected = stock(folder)(
            prompt="a red cat", num_inference_steps=2, width=SIDE, height=SIDE,
            generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
    assert np.abs(values(drawn.image) - values(expected)).max() <= 1
    assert values(expected).std() > 5
    if family == "flux1":
        with pytest.raises(InputError, match="reads no negative prompt"):
            generator.draw([ask("a red cat", negative="a dog")])


def test_inpainting_is_that_of_the_stock_pipeline_within_the_mask(tmp_path):
    folder = diffusion_pipelines.saved(diffusion_pipelines.stable_diffusion(), tmp_path / "base")
    generator = PictureGenerator(find_base(str(folder)))
    before = generator.draw([ask("a red cat")])[0].image
    mask = Image.new("L", before.size)
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    request = ask("a dog", seed=4, steps=5, init=before, mask=mask, strength=0.6)
    drawn = values(generator.draw([request])[0].image)
    pipe = stock(folder, "StableDiffusionInpaintPipeline")
    with quiet_diffusers():
        expected = values(
            pipe(
                "a dog", image=before, mask_image=mask, strength=0.6, num_inference_steps=5, width=SIDE, height=SIDE,
                generator=torch.Generator().manual_seed(4),
            ).images[0]
        )  # fmt: skip
    inside = np.asarray(mask) > 0
    assert np.abs(drawn - expected)[inside].max() <= 1
    assert np.abs(drawn - values(before))[inside].max() > 20
    assert (drawn == values(before))[~inside].all()
