"""ARD-LoRA through the command line: trained, proved, stored, exported for stock PEFT, and resumed to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from haori.bases import find_base
from haori.library import Library, attach
from haori.training import resume_run
from tests.command_line import haori
from tests.library_samples import run, stock_logits

SETTINGS = [
    "method.kind=ard_lora", "method.rank=4", "method.gate_lr=0.1", "training.epochs=2", "training.save_every=4",
    "optimizer.lr=5e-3", "training.keep_checkpoints=100",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(base, data, name, *settings):
    sets = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return ["train", "--base", base, "--data", data, "--name", name, *sets]


def test_a_run_learns_ranks_and_its_adapter_goes_everywhere(capsys, haori_home, tiny_base_folder, data, tmp_path):
    done = haori(capsys, *words(tiny_base_folder, data, "ranks", "method.train_norms=true"))
    assert done.code == 0, done.err
    folder = next((haori_home / "runs").iterdir())
    record = json.loads((folder / "run.json").read_text())
    ranks = record["ranks"]
    assert len(ranks) == 14 and len(ranks["model.layers.0.self_attn.q_proj"]) == 4
    assert len({rank for heads in ranks.values() for rank in heads}) > 1
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    penalised = [line["step"] for line in steps if line.get("penalty") is not None]
    total = record["steps"]
    assert penalised == list(range(1 + -(-total // 10), 1 + total - round(0.3 * total)))
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    stored = Library().get("ranks")
    config = json.loads((stored.path / "adapter_config.json").read_text())
    assert config["peft_type"] == "ARD_LORA" and config["head_ranks"] == ranks
    tensors = load_file(stored.path / "adapter_model.safetensors")
    assert not [key for key in tensors if "rho" in key]
    live = run(attach(find_base(str(tiny_base_folder)), stored.path, dtype="fp32"))
    out = Library().export("ranks", tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for ours, stock in zip(live, stock_logits(tiny_base_folder, out), strict=True):
        assert torch.allclose(ours, stock, atol=1e-5)
    merged = haori(capsys, "merge", "ranks", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err


def test_a_run_cut_back_to_any_checkpoint_ends_the_same(capsys, haori_home, tiny_base_folder, data):
    done = haori(capsys, *words(tiny_base_folder, data, "whole", "training.save_every=1"))
    assert done.code == 0, done.err
    folder = next((haori_home / "runs").iterdir())
    expected = load_file(folder / "adapter" / "adapter_model.safetensors")
    record = json.loads((folder / "run.json").read_text())
    for share in (0.9, 0.5, 0.05):  # settled, learning, at rest
        last = max(1, int(share * record["steps"]))
        for checkpoint in (folder / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > last:
                shutil.rmtree(checkpoint)
        shutil.rmtree(folder / "adapter")
        (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
        resumed = resume_run(folder)
        assert json.loads(resumed.record.model_dump_json())["ranks"] == record["ranks"]
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_leaves_no_room_for_learning_ranks_is_a_sentence(capsys, tiny_base_folder, data):
    done = haori(capsys, *words(tiny_base_folder, data, "none", "method.warmup=0.7", "method.settle=0.5"))
    assert done.code == 2 and "leave ARD-LoRA no steps" in done.err and "Traceback" not in done.err
