"""The commands and the Python example of the chapter on pictures, run in its order.

Only the base is a tiny one, the pictures are ours, and runs are cut short.
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "docs/guide/pictures.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
SHORT = ("training.epochs=2", "training.evaluations_per_epoch=1", "training.batch_size=6", "samples.steps=2",
         "samples.sheets=1", "optimizer.lr=0.01", "training.dtype=fp32")  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_chapter_on_pictures_goes_from_its_first_command_to_its_last(
    tmp_path: Path, haori_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(stable_diffusion(), tmp_path / "my-base")
    picture_folder(tmp_path / "my-pictures", 12, size=(32, 32))
    lines = [line for block in blocks(CHAPTER, "shell") for line in block.splitlines()]
    assert set(blocks(README.partition("\n## Pictures\n")[2], "shell")[0].splitlines()) <= {
        lines[0], "haori train --base emoji-sd --data my-pictures --name lineart"
    }  # fmt: skip
    assert lines[0] == "haori demo --images"  # has a test of its own, on its own base
    said = {}
    for line in lines[1:]:
        words = [
            {"emoji-sd": "my-base", "watercolour:0.5": "lineart-early:0.5"}.get(w, w) for w in shlex.split(line)[1:]
        ]
        if words[0] == "train":
            words += [part for setting in SHORT for part in ("--set", setting)]
        if words[2].startswith("RUN_FOLDER"):
            words[2] = str(sorted(haori_home.glob("runs/lineart-*/checkpoints/step-*"))[0])
        done = haori(capsys, *words)
        assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
        said[line] = done.out + done.err
    names = [line.split()[1] for line in said]
    assert names == [
        "data", "train", "train", "library", "train", "library", "train", "library", "library", "blend", "merge",
    ]  # fmt: skip
    words = next(text for line, text in said.items() if "words=" in line)
    assert "lineart-word@1 is trained and proved" in words.replace("\n", " ")
    assert "Contact sheet of 12 pictures: sheet.png" in said[lines[1]]
    assert "optimizer steps" in said[lines[2]]
    tail = said[lines[3]].replace("\n", " ")
    assert "lineart@1 is trained and proved" in tail and "samples.png" in tail
    assert "haori library export lineart@1 --format kohya --out lineart.safetensors" in tail
    shown = next(text for line, text in said.items() if line.startswith("haori library show"))
    assert re.search(r"trigger words\W+lineart", shown) and re.search(r"recommended strength\W+1", shown)
    assert (tmp_path / "lineart.safetensors").is_file() and (tmp_path / "lineart-merged" / "unet").is_dir()
    (example,) = (text for text in blocks(CHAPTER, "python") if "a snail" in text)
    short = example.replace('a snail")', 'a snail", num_inference_steps=2)')
    assert short != example
    exec(compile(short, "pictures.md", "exec"), {})
    assert (tmp_path / "snail.png").is_file()
