"""Pixels, masks and captions of a row: what is trained on is what was cut out, changed as it was drawn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from haori.core.errors import DataError
from haori.core.hashing import hash_file
from haori.data.pictures.captions import holds, training_caption
from haori.data.pictures.row import Augmentation, Crop, PictureRow
from haori.data.pictures.tensors import (
    Colours,
    draw_colours,
    draw_crop,
    loss_weights,
    mask_of,
    pixels,
)
from tests.pictures import picture, picture_folder, read

CHANGE_NOTHING = Colours(1.0, 1.0, 1.0, 0.0)


def row_of(path: Path, size: tuple[int, int], bucket: tuple[int, int], crop: Crop, **keys) -> PictureRow:
    digest = hash_file(path) if path.exists() else ""
    return PictureRow(
        origin=path.name, file=path, caption="", content_hash=digest, width=size[0], height=size[1], bucket=bucket,
        crop=crop, **keys,
    )  # fmt: skip


@pytest.fixture
def wide(tmp_path: Path) -> PictureRow:
    """A row of 128 x 64 without any scaling, of which 64 x 64 are cut out at 40, 0."""
    picture(1, (128, 64)).save(tmp_path / "a.png")
    return row_of(tmp_path / "a.png", (128, 64), (64, 64), Crop((128, 64), 40, 0))


def test_pixels_are_those_of_the_crop(wide: PictureRow):
    found = pixels(wide)
    expected = np.asarray(picture(1, (128, 64)))[:, 40:104].astype(np.float64) / 255 * 2 - 1
    assert found.shape == (3, 64, 64)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy().transpose(1, 2, 0) - expected).max() < 1e-6
    assert torch.equal(pixels(wide, flip=True), found.flip(2))
    assert not torch.equal(pixels(wide, crop=Crop((128, 64), 0, 0)), found)


def test_a_picture_that_has_changed_since_it_was_read_is_refused(wide: PictureRow):
    picture(2, (128, 64)).save(wide.file)
    with pytest.raises(DataError, match=r"a.png has changed since the pictures were read"):
        pixels(wide)
    wide.file.unlink()
    with pytest.raises(DataError, match=r"a.png cannot be read: No such file"):
        pixels(wide)


def test_a_mirrored_crop_shows_the_same_part(wide: PictureRow, tmp_path: Path):
    mirrored = picture(1, (128, 64)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(tmp_path / "b.png")
    path = tmp_path / "b.png"
    other = replace(wide, file=path, content_hash=hash_file(path), crop=wide.crop.mirrored(wide.bucket))
    assert torch.equal(pixels(other), pixels(wide, flip=True))


def test_scaling_keeps_the_shape(tmp_path: Path):
    """A disc of a 300 x 200 picture stays a disc, and its middle stays in the middle."""
    down, across = np.mgrid[0:200, 0:300]
    disc = ((across - 149.5) ** 2 + (down - 99.5) ** 2 < 60**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "a.png")
    [row] = read(tmp_path, caption="disc", validation_share=0.0).train
    found = pixels(row)[0] > 0
    rows, columns = np.nonzero(found.numpy())
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    assert abs(np.ptp(rows) + 1 - 120 * row.crop.scaled[1] / 200) <= 1.5
    assert abs(rows.mean() - (row.bucket[1] - 1) / 2) < 0.6
    assert abs(columns.mean() - (row.bucket[0] - 1) / 2) < 0.6


def test_scaling_is_what_pil_does_with_the_whole_picture(tmp_path: Path):
    """The reference scales everything and cuts then; away from the edges of the cut nothing differs."""
    picture(4, (300, 200)).save(tmp_path / "a.png")
    row = row_of(tmp_path / "a.png", (300, 200), (64, 64), Crop((96, 64), 20, 0))
    whole = np.asarray(picture(4, (300, 200)).resize((96, 64), Image.Resampling.LANCZOS)).astype(np.float64)
    found = (pixels(row).numpy().transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(found - whole[:, 20:84])[:, 4:-4].max() <= 1.0
    assert np.abs(found - whole[:, 20:84]).mean() < 0.5


def test_a_strip_is_not_scaled_whole(tmp_path: Path):
    """To cover its bucket it would be scaled to 40 x 4,000,000 pixels."""
    picture(4, (1, 40_000)).save(tmp_path / "a.png")
    [row] = read(tmp_path, caption="x", validation_share=0.0).train
    assert row.crop.scaled[0] * row.crop.scaled[1] > 30_000_000
    assert row.notes == ("enlarged", "more than a third cut off")
    assert pixels(row).shape == (3, row.bucket[1], row.bucket[0])


def test_random_crops_reach_every_place(wide: PictureRow):
    row = replace(wide, augmentation=Augmentation(crop="random"))
    random = np.random.default_rng(0)
    crops = [draw_crop(row, random) for _ in range(2000)]
    assert {crop.left for crop in crops} == set(range(65))
    assert {crop.top for crop in crops} == {0}
    assert draw_crop(wide, random) == wide.crop


def test_colours_change_as_they_are_drawn(wide: PictureRow):
    plain = pixels(wide)
    assert (pixels(wide, colour=CHANGE_NOTHING) - plain).abs().mean() < 0.02  # through HSV and back, in 8 bits
    darker = pixels(wide, colour=replace(CHANGE_NOTHING, brightness=0.5))
    assert torch.allclose((darker + 1) / 2, (plain + 1) / 4, atol=0.04)
    grey = pixels(wide, colour=replace(CHANGE_NOTHING, saturation=0.0))
    luma = 0.299 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2]  # ITU-R BT.601
    assert torch.allclose(grey, luma.expand(3, -1, -1), atol=0.02)


def test_a_turn_of_the_hue_by_a_third_turns_red_to_green(tmp_path: Path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    row = row_of(tmp_path / "a.png", (8, 8), (8, 8), Crop((8, 8), 0, 0))
    found = pixels(row, colour=replace(CHANGE_NOTHING, hue_degrees=120.0))[:, 0, 0]
    assert torch.allclose(found, torch.tensor([-1.0, 1.0, -1.0]), atol=0.04)


def test_drawn_colours_stay_within_the_strength(wide: PictureRow):
    row = replace(wide, augmentation=Augmentation(colour=0.4))
    random = np.random.default_rng(1)
    drawn = [draw_colours(row, random) for _ in range(500)]
    for name in ("brightness", "contrast", "saturation"):
        values = [getattr(colours, name) for colours in drawn]
        assert 0.8 <= min(values) < 0.82
        assert 1.18 < max(values) <= 1.2
    assert 6.5 < max(colours.hue_degrees for colours in drawn) <= 7.2
    assert draw_colours(wide, random) is None


def test_masks_are_cut_as_the_picture_is(wide: PictureRow, tmp_path: Path):
    mask = np.zeros((64, 128), dtype=np.uint8)
    mask[:, 50:60] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    found = mask_of(replace(wide, mask=tmp_path / "m.png"))
    assert found is not None
    assert found.shape == (1, 64, 64)
    assert torch.nonzero(found[0].sum(0)).flatten().tolist() == list(range(10, 20))
    flipped = mask_of(replace(wide, mask=tmp_path / "m.png"), flip=True)
    assert flipped is not None
    assert torch.nonzero(flipped[0].sum(0)).flatten().tolist() == list(range(44, 54))
    assert mask_of(wide) is None


def test_masks_of_another_size_are_scaled(wide: PictureRow, tmp_path: Path):
    Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 8, 0).repeat(8, 1)).save(tmp_path / "m.png")
    found = mask_of(replace(wide, mask=tmp_path / "m.png"))
    assert found is not None
    assert found[0, :, :16].max() < 0.1  # the border is at 64, less the 40 that are cut off
    assert found[0, :, 32:].min() > 0.9


def test_the_alpha_channel_is_a_mask(tmp_path: Path):
    folder = picture_folder(tmp_path, 3)
    values = np.asarray(picture(0, (64, 64), "RGBA")).copy()
    values[:, :32, 3] = 0
    Image.fromarray(values).save(folder / "00.png")
    rows = read(folder, validation_share=0.0, masks="alpha").train
    found = mask_of(rows[0])
    assert found is not None
    assert found[0, :, :32].max() == 0
    assert found[0, :, 32:].min() == 1
    assert rows[1].mask is None


def test_loss_weights_are_means_over_latent_pixels():
    mask = torch.zeros(1, 16, 32)
    mask[:, :8, :4] = 1.0  # half of the first latent pixel of 8 x 8
    weights = loss_weights(mask, 2, 4, unmasked_weight=0.1)
    expected = torch.full((1, 2, 4), 0.1)
    expected[0, 0, 0] = 0.1 + 0.9 * 0.5
    assert torch.allclose(weights, expected)


def captions(caption: str, count: int = 400, **keys) -> list[str]:
    row = replace(
        row_of(Path("x"), (8, 8), (8, 8), Crop((8, 8), 0, 0), augmentation=Augmentation(**keys)), caption=caption
    )
    random = np.random.default_rng(0)
    return [training_caption(row, random) for _ in range(count)]


def test_a_caption_is_used_as_it_is():
    assert set(captions("a, b,c")) == {"a, b,c"}


def test_the_trigger_is_put_in_front_once():
    assert set(captions("a cat", trigger="sks")) == {"sks, a cat"}
    assert set(captions("a sks cat", trigger="sks")) == {"a sks cat"}
    assert set(captions("tasks", trigger="sks")) == {"sks, tasks"}
    assert set(captions("", trigger="sks")) == {"sks"}
    assert set(captions("a cat", trigger="sks", caption_separator=" ")) == {"sks a cat"}


@pytest.mark.parametrize(("caption", "there"), [
    ("sks dog", True), ("a dog, sks", True), ("SKS dog", False), ("sksdog", False), ("tasks sks", True), ("sks", True),
])  # fmt: skip
def test_a_trigger_is_a_word_of_its_own(caption: str, there: bool):
    assert holds(caption, "sks") is there


def test_captions_are_dropped_as_often_as_asked():
    found = captions("a cat", 20_000, trigger="sks", caption_dropout=0.25)
    assert set(found) == {"", "sks, a cat"}
    assert abs(found.count("") - 5000) < 245  # four standard deviations


def test_shuffling_keeps_the_front_and_every_part():
    found = captions("one, two, three, four", shuffle_caption=True, keep_tokens=1, trigger="sks")
    assert len(set(found)) == 6
    for caption in found:
        parts = caption.split(", ")
        assert parts[:2] == ["sks", "one"]
        assert sorted(parts[2:]) == ["four", "three", "two"]


def test_a_trigger_among_the_parts_comes_to_the_front():
    found = captions("two, sks, three", shuffle_caption=True, trigger="sks")
    assert set(found) == {"sks, two, three", "sks, three, two"}


def test_draws_do_not_depend_on_the_caption():
    one, two = np.random.default_rng(5), np.random.default_rng(5)
    row = row_of(Path("x"), (8, 8), (8, 8), Crop((8, 8), 0, 0), augmentation=Augmentation(shuffle_caption=True))
    training_caption(replace(row, caption="a, b, c, d, e"), one)
    training_caption(replace(row, caption="a"), two)
    assert one.random() == two.random()
