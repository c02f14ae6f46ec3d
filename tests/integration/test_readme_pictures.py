"""The README's three pictures: their commands run as written, and they are what those commands drew."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from haori.core.settings import settings
from haori.images.infotext import read_infotext
from tests.command_line import haori

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = next(block for block in re.findall(r"^```shell\n(.*?)^```$", README, re.M | re.S) if "two_styles.py" in block)
TRAIN, WORKSPACE, *DRAW = BLOCK.splitlines()


def shown(folder: str) -> Path:
    return ROOT / "docs" / "pictures" / f"{folder}.png"


def test_the_commands_draw_three_pictures_by_the_base_one_adapter_and_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    python, script, *options = shlex.split(TRAIN)
    assert python == "python"
    subprocess.run([sys.executable, ROOT / script, *options, "--smoke"], cwd=tmp_path, check=True, capture_output=True)
    name, _, folder = WORKSPACE.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, str(tmp_path / folder))
    settings.cache_clear()
    monkeypatch.chdir(tmp_path)
    pixels = set()
    for line in DRAW:
        words = shlex.split(line)[1:]
        done = haori(capsys, *words)
        assert done.code == 0, done.err
        (picture,) = Path(words[-1]).iterdir()
        with Image.open(picture) as image:
            pixels.add(image.tobytes())
    assert len(pixels) == len(DRAW) == 3


def test_the_pictures_are_those_of_the_commands():
    for line in DRAW:
        _, _, prompt, *options = shlex.split(line)
        seed = options[options.index("--seed") + 1]
        with Image.open(shown(options[-1])) as image:
            made = read_infotext(image.text["parameters"])
        assert (made.prompt, made.settings["Seed"], made.settings["Steps"]) == (prompt, seed, "25")
        assert f'src="docs/pictures/{options[-1]}.png"' in README
