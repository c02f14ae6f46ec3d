"""The base that is part of Haori: found by name, whole, of stock classes, and it draws what it is asked for."""

import numpy as np
import pytest
import torch

from haori import bases
from haori.bases.embedded import EMBEDDED
from haori.core.errors import BaseError, LibraryError
from haori.images.generation import PictureGenerator
from haori.images.request import PictureRequest
from haori.library.adapter_names import check_no_base_name


def test_it_is_found_by_its_name_with_its_licence():
    base = bases.find_base("emoji-sd")
    assert base.pipeline == "StableDiffusionPipeline"
    assert set(base.components) == {"text_encoder", "unet", "vae"}
    assert base.licence == "Apache-2.0 AND MIT AND CC-BY-4.0"
    assert base.parameters < 20e6
    entry = {entry.name: entry for entry in bases.list_bases()}["emoji-sd"]
    assert entry.installed
    assert entry.problem is None
    assert entry.licence == base.licence
    assert bases.add_base("emoji-sd").path == base.path


def test_its_name_is_taken(tmp_path):
    with pytest.raises(BaseError, match="part of Haori"):
        bases.remove_base("emoji-sd")
    with pytest.raises(BaseError, match="belongs to the catalogue"):
        bases.add_base(str(tmp_path), name="emoji-sd")
    with pytest.raises(LibraryError, match="a base is called so"):
        check_no_base_name("emoji-sd", "other")
    with pytest.raises(BaseError, match="did you mean 'emoji-sd'"):
        bases.find_base("emoji-sb")
    with pytest.raises(BaseError, match="only applies to hub models"):
        bases.find_base("emoji-sd", revision="main")


def test_its_folder_is_whole_small_and_says_what_it_was_made_from():
    folder = EMBEDDED["emoji-sd"].folder
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 40e6
    assert sorted(file.parent.name for file in folder.rglob("*.safetensors")) == ["text_encoder", "unet", "vae"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for said in ("Noto Emoji", "Fluent Emoji Flat", "Emoji One (Monotone)", "CC-BY-4.0", "is the nearest", "KID"):
        assert said in card
    assert bases.find_base(str(folder)).licence == "Apache-2.0 AND MIT AND CC-BY-4.0"


def test_stock_diffusers_loads_it_and_captions_change_the_picture():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED["emoji-sd"].folder)
    pipeline.set_progress_bar_config(disable=True)

    def draw(caption):
        seeds = torch.Generator().manual_seed(0)
        return pipeline(caption, num_inference_steps=6, guidance_scale=3.0, generator=seeds, output_type="np").images[0]

    heart = draw("noto red heart")
    assert heart.shape == (64, 64, 3)
    assert np.isfinite(heart).all()
    assert heart.std() > 0.05  # no blank page
    np.testing.assert_array_equal(heart, draw("noto red heart"))
    assert np.abs(heart - draw("fluent green apple")).mean() > 0.02


def test_its_autoencoder_gives_a_picture_back():
    from diffusers import AutoencoderKL
    from PIL import Image

    from haori.data import __file__ as data

    coder = AutoencoderKL.from_pretrained(EMBEDDED["emoji-sd"].folder / "vae")
    file = data.replace("__init__.py", "samples/pictures/lineart/pineapple.png")
    pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 127.5 - 1)
    picture = pixels.permute(2, 0, 1)[None]
    with torch.no_grad():
        back = coder.decode(coder.encode(picture).latent_dist.mode()).sample
    error = ((back.clamp(-1, 1) - picture) / 2).square().mean().item()
    assert -10 * np.log10(error) > 15  # decibels; a style that it never saw


@pytest.mark.parametrize(("asked", "written"), [(None, "CFG scale: 3,"), (7.5, "CFG scale: 7.5,")])
def test_it_is_drawn_at_its_own_guidance_unless_another_is_asked_for(asked, written):
    generator = PictureGenerator(bases.find_base("emoji-sd"))
    (drawn,) = generator.draw([PictureRequest("red heart", steps=1, seed=1, guidance=asked)])
    assert written in drawn.infotext
