"""Training on pictures in real processes: signals, a shared cache, the plan, a sweep, and what goes wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import haori
from haori.core.errors import TrainingError
from haori.core.records import RunRecord
from tests.command_line import haori as command
from tests.diffusion_pipelines import saved, stable_diffusion
from tests.pictures import picture_folder

STEPS = 30
SETTINGS = [
    "task=text_to_image", "data.resolution=32", "data.bucket_step=8", "data.validation_share=0", "samples.prompts=[]",
    "training.epochs=99", f"training.max_steps={STEPS}", "training.save_every=1", "training.batch_size=2",
    "training.keep_checkpoints=1", "method.rank=2", "method.target=attention", "data.flip=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    saved(stable_diffusion(block_out_channels=(8, 16)), folder / "base")
    picture_folder(folder / "data", 4, size=(32, 32))
    return folder


def words(root: Path, name: str, *overrides: str) -> list[str]:
    flags = [word for setting in (*SETTINGS, *overrides) for word in ("--set", setting)]
    return ["train", "--base", str(root / "base"), "--data", str(root / "data"), "--name", name, *flags]


def begin(home: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HAORI_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", *arguments], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def run_of(home: Path, name: str) -> Path | None:
    return next(home.glob(f"runs/{name}-*"), None)


def wait_for_step(process: "subprocess.Popen[str]", home: Path, name: str, step: int) -> Path:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        folder = run_of(home, name)
        file = folder / "metrics.jsonl" if folder else None
        if folder and file and file.is_file() and file.read_text().count('"kind": "train"') >= step:
            return folder
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("the run did not get far enough")


def test_two_runs_at_once_share_the_cache_and_an_interrupted_one_ends_like_the_other(root: Path, tmp_path: Path):
    home = tmp_path / "home"
    whole, other = begin(home, words(root, "whole")), begin(home, words(root, "other"))
    folder = wait_for_step(other, home, "other", 3)
    other.send_signal(signal.SIGINT)
    out, err = other.communicate(timeout=200)
    assert other.returncode == 130, err
    assert f"haori train --resume {folder}" in out
    assert not (folder / "adapter").exists()
    resumed = begin(home, ["train", "--resume", str(folder)])
    out, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert "Resuming after step" in err and "is trained and proved" in out
    _, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    found = [run_of(home, name) for name in ("whole", "other")]
    one, two = ((run or home) / "adapter" / "adapter_model.safetensors" for run in found)
    assert one.read_bytes() == two.read_bytes()
    assert not [path for path in (home / "cache").rglob(".*") if path.is_file() and path.suffix != ".lock"]


def test_plan_advice_and_sweep_speak_of_pictures(root: Path, tmp_path: Path, capsys: Any):
    short = ["training.max_steps=2", "training.save_every=9"]
    planned = command(capsys, *words(root, "planned", *short), "--dry-run")
    assert planned.code == 0, planned.err
    assert "pixels per epoch" in planned.out and "pictures as the model sees them" in planned.out
    assert "tokens" not in planned.out + planned.err and not list(tmp_path.rglob("runs/*"))
    done = command(capsys, *words(root, "advised", *short))
    assert done.code == 0, done.err
    assert "Hold a tenth of the pictures out for validation" in done.out
    record = RunRecord.model_validate_json(next(tmp_path.rglob("runs/advised-*/run.json")).read_text())
    (recipe,) = tmp_path.rglob("runs/advised-*/recipe.yaml")
    assert record.advice
    for advice in record.advice:
        haori.load_recipe(recipe, [f"{key}={value}" for key, value in advice.changes.items()])
    refused = command(capsys, "sweep", recipe, "--over", "optimizer.lr=1e-3,1e-2")
    assert refused.code == 2 and "validation" in refused.err and "Traceback" not in refused.err
    held_out = ["--set", "data.validation_share=0.3", "--set", "training.epochs=2", "--set", "training.max_steps=2"]
    swept = command(capsys, "sweep", recipe, "--over", "optimizer.lr=1e-3,1e-2", "--trials", "2", *held_out)
    assert swept.code == 0, swept.err
    assert "2 of 2 trials" in swept.out and "best.yaml" in swept.out


def test_a_loss_that_is_no_number_names_the_pictures(root: Path, monkeypatch: pytest.MonkeyPatch):
    from haori.bases.diffusion import DiffusionModel

    forward = DiffusionModel.forward

    def broken(self: Any, noisy: torch.Tensor, *given: Any, **conditions: Any) -> Any:
        found = forward(self, noisy, *given, **conditions)
        found.sample[0] = found.sample[0] * torch.nan
        return found

    monkeypatch.setattr(DiffusionModel, "forward", broken)
    with pytest.raises(
        TrainingError, match=r"loss became nan at step 1 in .*\d\d\.png; look at these pictures or lower"
    ):
        haori.train(base=str(root / "base"), data=str(root / "data"), name="x", overrides=SETTINGS, progress=False)


def test_an_exhausted_memory_is_answered_by_settings_for_pictures(root: Path, monkeypatch: pytest.MonkeyPatch):
    from haori.bases.diffusion import DiffusionModel

    def exhausted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000 bytes.")

    monkeypatch.setattr(DiffusionModel, "forward", exhausted)
    monkeypatch.setattr("haori.training.out_of_memory.peak_memory_bytes", lambda device: 40_000_000_000)
    said = r"microbatch of up to \d+ pixels .*training\.micro_batch_size=1 \(about .*gradient_checkpointing=true"
    with pytest.raises(TrainingError, match=said):
        haori.train(base=str(root / "base"), data=str(root / "data"), name="x", overrides=SETTINGS, progress=False)
    with pytest.raises(TrainingError, match=r"helps: data\.resolution=\d+ \(about"):
        haori.train(base=str(root / "base"), data=str(root / "data"), name="x", progress=False,
                    overrides=[*SETTINGS, "training.micro_batch_size=1", "data.resolution=64"])  # fmt: skip
