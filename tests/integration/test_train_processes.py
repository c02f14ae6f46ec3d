"""Two processes under `torchrun` train what one process trains, and stop and fail together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

OVERRIDES = {
    "training.epochs": "2", "training.dtype": "fp32", "training.batch_tokens": "240",
    "training.micro_batch_tokens": "60",
    "optimizer.lr": "5e-3", "method.rank": "4",
}  # fmt: skip
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def train(launcher: list[str], base: Path, data: Path, home: Path, processes: int) -> Path:
    words = [*launcher, "-m", "haori.cli.app", "train", "--base", str(base), "--data", str(data), "--name", "x"]
    for key, value in OVERRIDES.items():
        words += ["--set", f"{key}={value}"]
    done = subprocess.run(
        words, env={**os.environ, "HAORI_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is trained and proved") == 1
    (folder,) = (home / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["processes"]) == ("finished", processes)
    return folder


def written_rows(folder: Path) -> Path:
    data = folder / "data.jsonl"
    rows = [{"prompt": f"number {i} {'x ' * (i % 9)}", "completion": f"it is {i % 3}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


SLOW_TO_RECORD = """
import time
from haori.cli.app import main
from haori.training import run

write_record = run.write_record
def slowly(folder, record):
    time.sleep(2 * (record.status == "stopped"))
    write_record(folder, record)
run.write_record = slowly
main()
"""


@contextmanager
def begin(home: Path, words: list[str], script: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Two processes that train; whatever is left of them at the end is killed."""
    command = [str(script)] if script else ["-m", "haori.cli.app"]
    with subprocess.Popen(
        [*TWO, *command, "train", *words],
        env={**os.environ, "HAORI_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            yield launcher
        finally:
            if launcher.poll() is None:
                for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
                    process.kill()
                launcher.communicate()


def train_to_the_end(home: Path, words: list[str]) -> None:
    with begin(home, words) as launcher:
        _, errors = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, errors


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    workers = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(rank)]
    (worker,) = workers
    return worker


def steps_done(home: Path) -> int:
    found = list(home.glob("runs/*/metrics.jsonl"))
    return found[0].read_text().count('"train"') if found else 0


LONG = [
    "--name", "x", "--set", "training.max_steps=80", "--set", "training.epochs=200", "--set", "training.dtype=fp32",
    "--set", "training.batch_tokens=120", "--set", "training.micro_batch_tokens=60", "--set", "optimizer.lr=5e-3",
    "--set", "method.rank=4", "--set", "method.dropout=0.2", "--set", "training.patience=1000",
]  # fmt: skip


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_resuming_is_exact(
    tiny_base_folder: Path, tmp_path: Path
):
    words = ["--base", str(tiny_base_folder), "--data", str(written_rows(tmp_path)), *LONG]
    train_to_the_end(tmp_path / "whole", words)
    home, slow = tmp_path / "stopped", tmp_path / "slow.py"
    slow.write_text(SLOW_TO_RECORD)  # or a launcher that ends what is left once one has exited is met by chance only
    with begin(home, words, slow) as launcher:
        deadline = time.monotonic() + 120
        while steps_done(home) < 5:
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.01)
        os.kill(rank_process(launcher, 1).pid, signal.SIGTERM)
        out, errors = launcher.communicate(timeout=90)  # the fault this catches is a process that waits for ever
        assert launcher.returncode != 0
    (folder,) = (home / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "stopped", errors
    assert 5 <= record["steps"] < 80
    assert out.count("Continue with:") == 1
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == f"step-{record['steps']:08d}"
    train_to_the_end(home, ["--resume", str(folder)])
    (uninterrupted,) = (tmp_path / "whole" / "runs").iterdir()
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, uninterrupted)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_two_processes_equal_one(tiny_base_folder: Path, tmp_path: Path):
    data = written_rows(tmp_path)
    one = train([sys.executable], tiny_base_folder, data, tmp_path / "one", 1)
    two = train(TWO, tiny_base_folder, data, tmp_path / "two", 2)
    metrics = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        assert abs(ours["loss"] - theirs["loss"]) < 1e-3
        assert ours.get("trained_tokens") == theirs.get("trained_tokens")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-2, atol=1e-3)
