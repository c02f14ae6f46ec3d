"""A whole sweep through the command line: killed in the middle, resumed, and nothing of it in the user's library."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from haori.tasks.recipe import load_recipe
from tests.command_line import haori as haori_command


@pytest.fixture
def recipe(tiny_base_folder: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": "numbers", "base": str(tiny_base_folder), "data": {"path": str(tmp_path / "rows.jsonl")},
        "training": {"dtype": "fp32", "epochs": 2},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def wait_for_step(process: "subprocess.Popen[str]", home: Path, trial: int, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for path in home.glob(f"sweeps/*/trials/{trial:04d}/runs/*/metrics.jsonl"):
            if path.read_text().count('"kind": "train"') >= step:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the sweep did not get far enough")


def is_running(job: Path) -> bool:
    """Say whether a job's child is alive, by its command line."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return any(str(job).encode() in line for line in lines)


@pytest.mark.timeout(600)  # four trainings, each importing everything anew
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the child in /proc")
def test_a_killed_sweep_goes_on_to_its_number_of_trials(capsys, haori_home, recipe, tmp_path):
    words = ["sweep", recipe, "--over", "lora.rank=2,4,8", "--trials", "9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", *map(str, words)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(process, haori_home, trial=1, step=1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (folder,) = (haori_home / "sweeps").iterdir()
    deadline = time.monotonic() + 20
    while is_running(folder / "trials" / "0001" / "job.json"):
        assert time.monotonic() < deadline, "the child outlived the sweep"
        time.sleep(0.05)

    out = tmp_path / "winner.yaml"
    done = haori_command(capsys, "sweep", "--resume", folder, "--out", out)
    assert done.code == 0, done.err
    assert "Trial 2 of 3" in done.err, "a grid smaller than the number of trials is gone through once"
    assert "Trial 1 of 3" not in done.err, "the finished trial is not repeated"
    assert "3 of 3 trials" in done.out
    assert f"Next: haori train {shlex.quote(str(out))}" in done.out
    losses = {}
    for path in folder.glob("trials/*/runs/*/run.json"):
        record = json.loads(path.read_text())
        made = load_recipe(path.with_name("recipe.yaml"))
        losses[made.method.rank] = record["validation_loss"]
    assert set(losses) == {2, 4, 8}
    winner = load_recipe(out)
    assert losses[winner.method.rank] == min(losses.values())
    assert f"# Validation loss {min(losses.values()):.4f}" in out.read_text()
    assert "auto" not in {winner.method.alpha, winner.training.batch_tokens, winner.data.max_length}
    assert (folder / "sweep.png").stat().st_size > 5000
    assert not (haori_home / "library").exists()
    assert not (haori_home / "runs").exists()
    assert not list(folder.rglob("checkpoints"))
    again = haori_command(capsys, "sweep", "--resume", folder)
    assert again.code == 0, again.err
    assert "Trial" not in again.err, "nothing is left to do"


def test_ctrl_c_stops_the_trial_and_says_how_to_go_on(haori_home, recipe):
    words = ["sweep", recipe, "--over", "method.rank=2,4", "--set", "training.epochs=200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", *map(str, words)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_step(process, haori_home, trial=0, step=1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    (folder,) = (haori_home / "sweeps").iterdir()
    assert "Stopped after 0 of 2 trials" in out
    assert f"haori sweep --resume {folder}" in out
    (run,) = folder.glob("trials/0000/runs/*/run.json")
    assert json.loads(run.read_text())["status"] == "stopped", "the child ended by itself, cleanly"


def test_what_no_trial_could_use_is_one_sentence_and_leaves_nothing(capsys, haori_home, recipe, tmp_path):
    for words, said in (
        (["--set", "data.path=absent.jsonl", "--over", "method.rank=2,4"], "absent.jsonl"),
        (["--over", "method.rnk=2,4"], "did you mean 'rank'"),
        (["--over", "method.rank=2,4", "--set", "data.validation_share=0"], "compares validation losses"),
        (["--resume", tmp_path, "--over", "method.rank=2,4"], "goes on with a sweep as it was"),
        (["--over", "method.rank=2,4", "--out", recipe], "exists already"),
        (["other.yaml", "--over", "method.rank=2,4"], "Give one recipe file; 2 were given"),
    ):
        done = haori_command(capsys, "sweep", recipe, *words)
        assert done.code == 2
        assert said in done.err
        assert "Traceback" not in done.err
    assert not list(haori_home.glob("sweeps/*"))
    missing = haori_command(capsys, "sweep", "--resume", tmp_path)
    assert (missing.code, "is not a sweep folder" in missing.err) == (2, True)
