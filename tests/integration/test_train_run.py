"""Whole runs through the command line, in real processes where signals matter."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import haori
from haori.tasks.recipe import kept_recipe
from tests.command_line import haori as haori_command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = [
    "--set", "training.epochs=3", "--set", "method.rank=4", "--set", "method.dropout=0.1",
    "--set", "training.save_every=1", "--set", "optimizer.lr=5e-3",
]  # fmt: skip


def command(base: Path, data: Path, name: str) -> list[str]:
    words = ["train", "--base", base, "--data", data, "--name", name, *SETTINGS]
    return [sys.executable, "-m", "haori.cli.app", *map(str, words)]


def steps_done(home: Path) -> tuple[Path | None, int]:
    for path in home.glob("runs/*/metrics.jsonl"):
        lines = [line for line in path.read_text().splitlines() if '"kind": "train"' in line]
        return path.parent, len(lines)
    return None, 0


def interrupt_at(process: "subprocess.Popen[str]", home: Path, step: int, number: int) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        folder, done = steps_done(home)
        if folder is not None and done >= step:
            process.send_signal(number)
            process.wait(60)
            return folder
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("the run did not get far enough")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def timeless(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_bytes(capsys, haori_home, tiny_base_folder, data, number):
    whole = haori.train(
        base=str(tiny_base_folder), data=str(data), name="whole", overrides=SETTINGS[1::2], progress=False
    )
    home = haori_home.with_name("killed-home")
    at = random.randint(1, whole.record.steps - 2)
    process = subprocess.Popen(
        command(tiny_base_folder, data, "killed"), env={**os.environ, "HAORI_HOME": str(home)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    folder = interrupt_at(process, home, at, number)
    out, err = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 143, err
        assert f"haori train --resume {folder}" in out
        assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    assert not (folder / "adapter").exists()
    resumed = subprocess.run(
        [sys.executable, "-m", "haori.cli.app", "train", "--resume", str(folder)],
        env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming after step" in resumed.stderr
    assert weights(folder) == weights(whole.folder), f"killed at step {at}"
    assert timeless(folder) == timeless(whole.folder)
    assert not list(folder.rglob(".*")), "half-written things were left"


def test_a_run_is_proved_stored_and_loads_in_stock_peft(capsys, haori_home, tiny_base_folder, data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "exported"
    done = haori_command(
        capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "numbers", "--out", out, *SETTINGS,
        "--set", "data.licence=CC-BY-4.0", "--set", "training.dtype=fp32",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "numbers@1 is trained and proved" in done.out
    stored = haori.Library().get("numbers")
    card = stored.card
    assert card.verification is not None
    assert card.verification.passed
    checks = {check.name: check for check in card.verification.checks}
    assert checks["reload"].value == 0.0
    assert "skipped" not in checks["prompt"].detail
    kept = kept_recipe(card)
    assert kept is not None
    assert kept.method.alpha == 8.0
    assert "CC-BY-4.0" in (card.licence or "")
    assert card.data[0].trained_tokens["train"] > 0
    assert card.run is not None
    assert card.run.best_step
    assert (haori_home / "runs").is_dir()
    run = next((haori_home / "runs").iterdir())
    assert (run / "loss.png").stat().st_size > 5000
    recipe = haori.load_recipe(run / "recipe.yaml")
    assert recipe == kept

    opened = haori.open_adapter("numbers", dtype="fp32")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32), out
    ).eval()
    ids = opened.tokenizer("what is number 7?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, theirs(ids).logits)
        with opened.strength(on=False):
            assert not torch.equal(opened.model(ids).logits, theirs(ids).logits)
    assert isinstance(opened.answer("what is number 7?", max_new_tokens=8), str)


def test_dry_run_prints_the_plan_and_leaves_nothing(capsys, haori_home, tiny_base_folder, data):
    done = haori_command(
        capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "x", "--dry-run", *SETTINGS
    )
    assert done.code == 0, done.err
    assert re.search(r"trainable parameters .* \d[\d,]* of \d", done.out)
    assert "peak memory, estimated" in done.out
    assert "[[it is " in done.out
    assert not (haori_home / "runs").exists()
    assert not (haori_home / "library").exists()


def test_a_resumed_run_refuses_changed_data(capsys, haori_home, tiny_base_folder, data):
    from haori.core.errors import MismatchError
    from haori.training import train_run

    recipe = haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", SETTINGS[1::2])
    stopped = []

    def stop_after(event):
        if event.kind == "progress" and event.step == 2 and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    run = train_run(recipe, on_event=stop_after)
    assert run.adapter is None
    assert run.signal == signal.SIGINT
    data.write_text(data.read_text() + json.dumps({"prompt": "new", "completion": "row"}) + "\n")
    with pytest.raises(MismatchError, match="changed since the run began"):
        haori.resume(run.folder, progress=False)


def test_the_same_run_gives_the_same_adapter_and_no_second_version(haori_home, tiny_base_folder, data):
    runs = [
        haori.train(
            base=str(tiny_base_folder), data=str(data), name="same", overrides=["training.epochs=1"], progress=False
        )
        for _ in range(2)
    ]
    assert weights(runs[0].folder) == weights(runs[1].folder)
    assert runs[1].adapter is not None
    assert runs[1].adapter.name == "same@1"
    assert len(haori.Library().list()) == 1


def test_resuming_what_runs_or_is_damaged_is_a_sentence(capsys, haori_home, tiny_base_folder, data):
    from haori.core.lock import file_lock

    def stop_after(event):
        if event.kind == "progress" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    from haori.training import train_run

    run = train_run(
        haori.api.recipe_of(None, str(tiny_base_folder), str(data), "x", SETTINGS[1::2]), on_event=stop_after
    )
    with file_lock(run.folder / "run.lock", holds="run"):
        done = haori_command(capsys, "train", "--resume", run.folder)
    assert done.code == 2
    assert "could not be locked" in done.err
    newest = sorted((run.folder / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"short")
    done = haori_command(capsys, "train", "--resume", run.folder)
    assert done.code == 2
    assert "too short for a header" in done.err
    (run.folder / "run.json").write_text("{")
    done = haori_command(capsys, "train", "--resume", run.folder)
    assert done.code == 2
    assert "is damaged" in done.err


def test_a_wrong_environment_variable_is_a_sentence(capsys, monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_OFFLINE", "banana")
    settings.cache_clear()
    done = haori_command(capsys, "bases", "list")
    assert done.code == 2
    assert "HAORI_OFFLINE cannot be 'banana'" in done.err
