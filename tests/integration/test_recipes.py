"""The scripts of docs/recipes run through, hardly trained; what must hold whatever was learnt is looked at."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setenv("HAORI_WORKSPACE", "")  # put back afterwards, which the recipe does not do

    def recipe(name: str) -> dict[str, Any]:
        figures = importlib.import_module(name).main(["--smoke", "--out", str(tmp_path / "out")])
        assert os.environ["HAORI_WORKSPACE"] == str(tmp_path / "out" / "haori")
        assert json.loads((tmp_path / "out" / "figures.json").read_text()) == json.loads(json.dumps(figures))
        with Image.open(tmp_path / "out" / "sheet.png") as sheet:
            assert min(sheet.size) > 100
        return figures

    yield recipe
    for path in RECIPES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_two_styles(run: Any) -> None:
    figures = run("two_styles")
    # By definition, so features and least squares are put together as they should be.
    for name, shares in (("base", (0, 0)), ("line art 1", (1, 0)), ("blue 1", (0, 1))):
        for style, share in zip(("line art", "blue"), shares, strict=True):
            assert figures[name][style] == pytest.approx([share] * 3, abs=1e-6)
    assert len(figures) == 7


def test_the_blue_ink_is_blue() -> None:
    sys.path.insert(0, str(RECIPES))
    try:
        two_styles = importlib.import_module("two_styles")
        ink, red, grey = ((16, 40, 150), (255, 0, 0), (90, 90, 90))
        picture = Image.new("RGB", (8, 8), "white")
        for colour, expected in ((ink, (134 / 255, 122 / 255)), (red, (1, -0.5)), (grey, (0, 0))):
            picture.paste(colour, (2, 2, 6, 6))
            assert two_styles.colours(picture) == pytest.approx(expected)
        assert two_styles.colours(Image.new("RGB", (8, 8), "white")) == (0, 0)
    finally:
        sys.path.remove(str(RECIPES))


def test_one_character(run: Any, tmp_path: Path) -> None:
    figures = run("one_character")
    assert set(figures) == {"base 0.7", "hako 0.5", "hako 0.7", "hako 0.9"}
    assert all(set(found["by pose"]) == {"standing", "waving"} for found in figures.values())
    figure, recipe = (importlib.import_module(name) for name in ("figure", "one_character"))
    outlines = recipe.np.stack(
        [recipe.outline(figure.draw_figure(figure.CHARACTERS[figure.HERO], pose)) for pose in figure.POSES.values()]
    )
    for name, pose in figure.POSES.items():  # another's outline in the pose is nearest to that pose
        assert recipe.nearest_pose(figure.draw_figure(figure.CHARACTERS["mouse"], pose), outlines) == name


def test_product_scenes(run: Any) -> None:
    figures = run("product_scenes")
    for way in ("pasted", "inpainted around"):
        assert figures[way]["pixels changed"] == 0  # not a pixel of the product
        assert figures[way]["kept"] == [1, 1, 1]
    assert figures["scene"]["scene"] == [1, 1, 1] and figures["scene"]["kept"][0] < 1
    changed = [figures[f"img2img {strength}"]["pixels changed"] for strength in (0.2, 0.4, 0.8)]
    assert changed == sorted(changed) and changed[0] > 0


def test_synthetic_test_data(run: Any, tmp_path: Path) -> None:
    figures = run("synthetic_test_data")
    assert figures["accuracy, trained on real"][0] > 0.5
    difference = figures["accuracy, trained on synthetic"][0] - figures["accuracy, trained on real"][0]
    assert figures["synthetic minus real"][0] == pytest.approx(difference, abs=0.0011)
    assert (tmp_path / "out" / "nearest.png").is_file()
