"""How pictures look: perceptual hashes against scipy's cosine transform, and the part that draws the eye."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from scipy.fft import dctn

from haori.data.pictures.likeness import group_alike, likeness_of
from haori.data.pictures.saliency import salient_point
from tests.pictures import picture, read


@pytest.mark.parametrize("seed", range(8))
def test_the_hash_is_the_sign_of_the_lowest_frequencies(seed: int):
    image = picture(seed, (200, 150))
    grey = image.resize((32, 32), Image.Resampling.LANCZOS).convert("L")
    low = dctn(np.asarray(grey, dtype=np.float64), type=2)[:8, :8].reshape(-1)
    expected = int("".join("01"[bool(bit)] for bit in low > np.median(low)), 2)
    assert (
        likeness_of(image).bits ^ expected
    ).bit_count() <= 2  # its colours are scaled, and not its grey: two near the median change places


def noisy(image: Image.Image, random: np.random.Generator) -> Image.Image:
    values = np.asarray(image).astype(int) + random.integers(-6, 7, size=(*image.size[::-1], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


CHANGES = {
    "smaller": lambda image: image.resize((90, 90)),
    "noisy": lambda image: noisy(image, np.random.default_rng(0)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.02),
    "cropped": lambda image: image.crop((1, 1, 191, 191)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_look_alike(change: str):
    images = [picture(number, (192, 192)) for number in range(10)]
    groups = group_alike([likeness_of(image) for image in [*images, *map(CHANGES[change], images)]])
    assert groups == [*range(10), *range(10)]


def test_other_pictures_do_not():
    assert group_alike([likeness_of(picture(number)) for number in range(200)]) == list(range(200))


def test_groups_go_over_members_in_between():
    """Each is near the next, and the ends are not near one another."""
    steps = [ImageEnhance.Brightness(picture(3)).enhance(1.0 - 0.02 * step) for step in range(5)]
    found = [likeness_of(image) for image in steps]
    assert len(set(group_alike(found))) == 1
    assert len(set(group_alike([found[0], found[-1]]))) == 2


def test_nothing_has_no_groups():
    assert group_alike([]) == []


@pytest.mark.parametrize(("across", "down"), [(0.2, 0.5), (0.8, 0.5), (0.5, 0.25), (0.75, 0.75)])
@pytest.mark.parametrize("texture", [0, 12])
def test_the_salient_point_is_at_the_thing_on_a_plain_ground(across: float, down: float, texture: int):
    random = np.random.default_rng(4)
    ground = 120 + texture * random.standard_normal((240, 320, 1))
    image = Image.fromarray(np.broadcast_to(ground, (240, 320, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = across * 320, down * 240
    draw.ellipse([x - 22, y - 22, x + 22, y + 22], fill=(250, 240, 30))
    draw.line([x - 15, y - 15, x + 15, y + 15], fill=(0, 0, 0), width=4)
    found = salient_point(image)
    assert abs(found[0] - across) < 0.08
    assert abs(found[1] - down) < 0.08


def test_without_contrast_the_point_is_the_middle():
    assert salient_point(Image.new("RGB", (50, 90), (7, 7, 7))) == (0.5, 0.5)


def test_smart_crops_keep_what_the_middle_loses(tmp_path: Path):
    image = Image.new("RGB", (300, 100), (90, 120, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle([20, 30, 60, 70], fill=(250, 250, 250))
    draw.ellipse([30, 40, 50, 60], fill=(200, 0, 0))
    image.save(tmp_path / "a.png")
    keys = {"caption": "x", "validation_share": 0.0, "buckets": False}
    [centre] = read(tmp_path, **keys).train
    [smart] = read(tmp_path, crop="smart", **keys).train
    kept = [(row.crop.left / row.crop.scaled[0], (row.crop.left + 64) / row.crop.scaled[0]) for row in (centre, smart)]
    assert kept[0][0] > 60 / 300
    assert kept[1][0] <= 20 / 300
    assert kept[1][1] >= 60 / 300
