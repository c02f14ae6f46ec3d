"""Two processes under `torchrun` train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

OVERRIDES = {
    "training.epochs": "2", "training.dtype": "fp32", "training.batch_tokens": "240",
    "training.micro_batch_tokens": "60",
    "optimizer.lr": "5e-3", "method.rank": "4",
}  # fmt: skip


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


def test_two_processes_equal_one(tiny_base_folder: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"number {i} {'x ' * (i % 9)}", "completion": f"it is {i % 3}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = train([sys.executable], tiny_base_folder, data, tmp_path / "one", 1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = train(launcher, tiny_base_folder, data, tmp_path / "two", 2)
    metrics = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        assert abs(ours["loss"] - theirs["loss"]) < 1e-3
        assert ours.get("trained_tokens") == theirs.get("trained_tokens")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-2, atol=1e-3)
