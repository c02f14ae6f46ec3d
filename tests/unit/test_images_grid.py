"""Sheets over strengths, epochs and seeds: which pictures they ask for, and where each stands."""

import numpy as np
import pytest
from PIL import Image

from haori.core.errors import InputError
from haori.images.generation import DrawnPicture
from haori.images.grid import Axis, grid_requests, grid_sheet, parse_axes
from haori.images.request import PictureRequest


def test_axes_are_lists_and_ranges():
    assert parse_axes(["strength=0.4,0.7,1.0", "epoch=1..3", "seed=5"]) == (
        Axis("strength", ("0.4", "0.7", "1.0")),
        Axis("epoch", ("1", "2", "3")),
        Axis("seed", ("5",)),
    )


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["strenght=1"], "did you mean 'strength'"),
        (["strength"], "is not known"),
        (["strength=a"], "where a number"),
        (["strength=nan"], "where a number"),
        (["strength="], "where a number"),
        (["seed=1.5"], "where a whole number"),
        (["seed=3..1"], "must rise"),
        (["seed=1..999999999"], "must rise, by 63"),
        (["seed=1", "seed=2"], "different axes"),
        (["seed=1", "steps=2", "epoch=1", "strength=1"], "one to 3"),
        (["seed=1..30", "steps=1..30"], "900 pictures"),
    ],
)
def test_axes_that_cannot_be_read_are_one_sentence(axes, said):
    with pytest.raises(InputError) as error:
        parse_axes(axes)
    assert said in str(error.value)


def test_cells_change_the_tag_and_the_settings():
    axes = parse_axes(["epoch=1,12", "strength=0.4,1", "seed=7,8"])
    asked = grid_requests(PictureRequest("a <lora:ink:0.7> cat", steps=3), axes)
    assert [(one.prompt, one.seed) for one in asked] == [
        (f"a <lora:ink-{epoch:06d}:{strength}> cat", seed)
        for epoch in (1, 12)
        for strength in ("0.4", "1")
        for seed in (7, 8)
    ]
    kept = grid_requests(PictureRequest("a <lyco:ink:te=0:unet=0.7>"), parse_axes(["epoch=3"]))
    assert kept[0].prompt == "a <lora:ink-000003:te=0:unet=0.7>"
    for prompt in ("a cat", "<lora:a:1><lora:b:1>"):
        with pytest.raises(InputError, match=r"names [02]"):
            grid_requests(PictureRequest(prompt), parse_axes(["strength=1,2"]))
    with pytest.raises(InputError, match="one picture a cell"):
        grid_requests(PictureRequest("a", count=2), parse_axes(["seed=1,2"]))


def test_each_picture_stands_in_its_row_and_column():
    axes = parse_axes(["strength=0.4,1", "seed=1..3"])
    drawn = [DrawnPicture(Image.new("RGB", (64, 64), (40 * number, 9, 90)), "", 0, ()) for number in range(6)]
    sheet = np.asarray(grid_sheet(drawn, axes, "a cat"))
    places = [np.argwhere((sheet == (40 * number, 9, 90)).all(-1)).mean(0) for number in range(6)]
    for row in range(2):
        heights = [places[row * 3 + column][0] for column in range(3)]
        assert max(heights) == min(heights)
        assert places[row * 3][1] < places[row * 3 + 1][1] < places[row * 3 + 2][1]
    assert places[0][0] < places[3][0] and places[0][1] == places[3][1]
