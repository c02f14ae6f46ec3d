"""`haori compare RUN`: epochs and strengths of a run on a tiny pipeline, looked at by a network made for the test."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from haori.bases import find_base
from haori.core.settings import settings
from tests.command_line import haori
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.picture_adapters import UNET, adapted, saved_adapter
from tests.picture_networks import Quarters
from tests.pictures import picture_folder

RECIPE = """
name: cat
task: text_to_image
base: {base}
data: {{path: {data}, resolution: 32, validation_share: 0.2, trigger: zkz}}
method: {{kind: lora, rank: 4, alpha: 4}}
optimizer: {{lr: 0.01}}
training: {{epochs: 3, batch_size: 4, dtype: fp32, evaluations_per_epoch: 1, keep_checkpoints: 9}}
samples: {{prompts: []}}
"""
DRAWN = ("--seeds", 2, "--steps", 2, "--guidance", 2)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, pictures, and a recipe of both."""
    monkeypatch.setattr("haori.metrics.picture_networks.load_network", lambda spec: Quarters())
    base = saved(stable_diffusion(), tmp_path / "tiny")
    folder = picture_folder(tmp_path / "pictures", 10, size=(32, 32))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=base, data=folder))
    (tmp_path / "others.txt").write_text("a tree\na car\n")
    return folder


@pytest.fixture
def run(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run folder as training leaves it, with three epochs and an adapter in the library."""
    base, folder = find_base(str(tmp_path / "tiny")), tmp_path / "run"
    for epoch in (1, 2, 3):
        saved_adapter(adapted(base, UNET, size=0.1 * epoch), folder / "checkpoints" / f"step-{2 * epoch:08d}")
    lines = [{"kind": "validation", "step": 2 * epoch, "epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    step = folder / "checkpoints" / "step-00000006"
    done = haori(capsys, "library", "add", step, "--base", tmp_path / "tiny", "--name", "cat")
    assert done.code == 0, done.err
    return folder


def test_epochs_and_strengths_of_a_run_are_compared(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = haori(capsys, "train", tmp_path / "recipe.yaml")
    assert trained.code == 0, trained.err
    (run,) = settings().runs.iterdir()
    out, others = tmp_path / "out", tmp_path / "others.txt"
    done = haori(
        capsys, "compare", run, "--epochs", "1,3", "--strengths", "0,0.5,1", *DRAWN, "--unrelated", others, "--out", out
    )
    assert done.code == 0, done.err
    found = json.loads((out / "comparison.json").read_text())
    assert [(one["epoch"], one["strength"]) for one in found["settings"]] == [
        (epoch, strength) for epoch in (1, 3) for strength in (0, 0.5, 1)
    ]
    drift = [one["metrics"]["drift"]["value"] for one in found["settings"]]
    assert drift[0] == drift[3] == pytest.approx(0, abs=1e-9), "strength 0 is the base"
    assert 0 < drift[1] < drift[2] and 0 < drift[4] < drift[5]
    losses = {one["epoch"]: one["loss"] for one in found["settings"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses == {line["epoch"]: line["loss"] for line in lines if line["kind"] == "validation" and
                      line["epoch"] in (1, 3)}  # fmt: skip
    assert len(found["prompts"]) == 8 and all(prompt.startswith("zkz, ") for prompt in found["prompts"])
    # What a checkpoint draws at a strength is what `haori generate` draws with it.
    step = Path(found["settings"][5]["adapter"])
    added = haori(capsys, "library", "add", step, "--base", tmp_path / "tiny", "--name", "last")
    assert added.code == 0, added.err
    again = haori(
        capsys, "generate", f"{found['prompts'][0]} <lora:last:0.5>", "--base", tmp_path / "tiny", "--seed", 0,
        "--steps", 2, "--guidance", 2, "--out", tmp_path / "again",
    )  # fmt: skip
    assert again.code == 0, again.err
    one = np.asarray(Image.open(out / "pictures" / "00000-epoch-3-at-0.5.png"), int)
    other = np.asarray(Image.open(tmp_path / "again" / "00000-0.png"), int)
    assert np.abs(one - other).max() <= 1, "batches differ in the last digit"


def test_what_is_shown_and_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, others = tmp_path / "out", tmp_path / "others.txt"
    done = haori(capsys, "compare", run, "--strengths", "0.5,1", *DRAWN, "--unrelated", others, "--out", out)
    assert done.code == 0, done.err
    found = json.loads((out / "comparison.json").read_text())
    assert len(found["settings"]) == 6, "all three epochs are kept"
    chosen = found["choice"]["recommended"]
    page = html.unescape((out / "comparison.html").read_text())
    assert found["rule"].split(",")[0] in page and page.count("<svg") >= 3 and page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:image/png)', page) and "<script" not in page
    with Image.open(out / "comparison.png") as sheet:
        assert sheet.height > 7 * 160, "the base and six settings"
    if chosen is None:
        assert "Every setting loses prompts or copies" in done.out
    else:
        best = found["settings"][chosen]
        assert f"epoch {best['epoch']:.3g} at {best['strength']:g}" in done.out and best["adapter"] in done.out
        assert page.count('class="recommended"') == 1 and page.count('class="ring"') >= 3
    arguments = ("compare", "cat", "--data", tmp_path / "pictures", *DRAWN, "--strengths", "1")
    stored = haori(capsys, *arguments, "--unrelated", others, "--out", tmp_path / "two")
    assert stored.code == 0, stored.err
    assert json.loads((tmp_path / "two" / "comparison.json").read_text())["settings"][0]["epoch"] is None


def test_what_cannot_be_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "recipe.yaml").write_text("name: a\nbase: b\ndata: {path: c}\n")
    for options, said in (
        ((run, "--epochs", "7"), "no checkpoint of epoch 7; kept are 1, 2, 3"),
        ((run, "--strengths", "0.5,high"), "'high' where a number belongs"),
        ((run, "--strengths", "1,1"), "different numbers"),
        ((run, "--methods", "lora"), "--methods is for comparing methods"),
        ((tmp_path / "recipe.yaml", "--strengths", "1"), "--strengths is for comparing epochs and strengths"),
        (("cat", "--epochs", "1"), "Epochs are those of a run"),
        (("nobody", "--strengths", "1"), "nobody"),
        (("cat", "--strengths", "1"), "does not say what it was trained on"),
        ((tmp_path / "pictures", "--strengths", "1"), "recipe.yaml"),
        ((tmp_path / "texts",), "is a run of causal_lm"),
    ):
        done = haori(capsys, "compare", *options)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, (options, done.err)
