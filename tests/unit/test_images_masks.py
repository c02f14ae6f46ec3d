"""What is done around inpainting: sizes, edges, fills and the masked part, against values that are plain to see."""

import numpy as np
import pytest
from PIL import Image

from haori.core.errors import InputError
from haori.images.masks import blurred, filled, masked_part, sized

RED, BLUE = (200, 0, 0), (0, 0, 200)


def halves(width: int = 64, height: int = 32) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def test_fill_keeps_proportions_and_draws_the_edges_out():
    image = halves()
    found = np.asarray(sized(image, (64, 64), "fill"))
    assert (found[16:48] == np.asarray(image)).all()  # in the middle, as it was
    assert (found[:16] == found[16]).all() and (found[48:] == found[47]).all()
    beside = np.asarray(sized(halves(32, 64), (64, 64), "fill"))
    assert (beside[:, :16] == RED).all() and (beside[:, 48:] == BLUE).all()


def test_crop_cuts_off_and_stretch_does_not():
    image = halves(96, 32)
    assert sized(image, (32, 32), "crop").getpixel((2, 16)) == RED
    assert sized(image, (32, 32), "crop").getpixel((30, 16)) == BLUE
    one_third = Image.new("RGB", (96, 32), RED)
    one_third.paste(BLUE, (0, 0, 32, 32))
    assert sized(one_third, (32, 32), "crop").getcolors() == [(1024, RED)]
    assert sized(one_third, (32, 32), "stretch").getpixel((2, 2)) == BLUE


def test_a_soft_edge_is_the_normal_distribution():
    """Of an edge, the blur is its cumulative distribution, cut off at 2.5 standard deviations."""
    mask = Image.new("L", (64, 8), 0)
    mask.paste(255, (32, 0, 64, 8))
    found = np.asarray(blurred(mask, 4.0, 4.0))[4].astype(float)
    at = np.arange(-10, 11)
    weights = np.exp(-(at**2) / 32)
    expected = [255 * weights[at >= 32 - x].sum() / weights.sum() for x in range(64)]
    assert np.abs(found - expected).max() <= 0.51
    assert found[21] == 0 and found[42] == 255
    assert blurred(mask, 0, 0) is mask


def test_the_fill_takes_the_colours_that_are_near():
    image = halves(128, 128)
    image.paste((0, 255, 0), (32, 32, 96, 96))
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (32, 32, 96, 96))
    found = np.asarray(filled(image, mask)).astype(int)
    outside = np.asarray(mask) == 0
    assert (found[outside] == np.asarray(image)[outside]).all()
    assert found[..., 1].max() <= 2  # nothing of what the mask covers
    assert found[64, 34, 0] > 150 > 60 > found[64, 34, 2] and found[64, 93, 2] > 150 > 60 > found[64, 93, 0]
    everything = Image.new("L", (128, 128), 255)
    assert filled(image, everything) is image


def test_the_masked_part_has_the_proportions_and_goes_back_to_its_place():
    image, mask = Image.new("RGB", (200, 100), RED), Image.new("L", (200, 100), 0)
    mask.paste(255, (150, 40, 170, 50))
    part = masked_part(image, mask, (64, 64), 5)
    # 20 x 10 with 5 around is 30 x 20, and 30 x 30 in the proportions of a square.
    assert np.asarray(part.mask).mean() / 255 == pytest.approx(20 * 10 / 30**2, rel=0.03)
    back = np.asarray(part.put_back(Image.new("RGB", (64, 64), BLUE)))
    blue = (back == BLUE).all(-1)
    assert blue.sum() == 200 and blue[40:50, 150:170].all()
    corner = Image.new("L", (200, 100), 0)
    corner.paste(255, (195, 0, 200, 100))
    tall = masked_part(image, corner, (64, 64), 0)
    assert (np.asarray(tall.put_back(Image.new("RGB", (64, 64), BLUE))) == BLUE).all(-1).sum() == 500
    with pytest.raises(InputError, match="no white part"):
        masked_part(image, Image.new("L", (200, 100), 0), (64, 64), 0)
