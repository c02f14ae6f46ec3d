"""The library through the command line: adapters that stock PEFT saved, proof, evaluation, chat, merge, refusals."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.command_line import haori
from tests.conftest import build_tiny_base

VARIANTS = {
    "rslora": {"use_rslora": True},
    "rank_pattern": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


def stock_adapter(base: Path, folder: Path, **options: object) -> Path:
    """What a PEFT user has on disk: an adapter with weights as if trained."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"prompt": f"film {i} was {'good' if i % 2 else 'bad'}", "completion": "yes" if i % 2 else "no"}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_adapter_of_stock_peft_is_added_verified_and_evaluated(
    capsys, haori_home, tiny_base_folder, tmp_path, reviews, kind
):
    folder = stock_adapter(tiny_base_folder, tmp_path / "adapter", **VARIANTS[kind])
    done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", kind, "--licence", "MIT")
    assert done.code == 0, done.err
    assert f"{kind}@1 is in the library" in done.out
    done = haori(capsys, "library", "verify", kind)
    assert done.code == 0, done.err
    assert "failed" not in done.out
    done = haori(
        capsys, "evaluate", kind, "--data", reviews, "--samples", 1, "--max-tokens", 4, "--out", tmp_path / "report"
    )
    assert done.code == 0, done.err
    assert "Accuracy" in done.out
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert len(written["rows"]) == 12
    assert written["metrics"]["perplexity"]["difference"] != 0
    assert "<html" in (tmp_path / "report" / "evaluation.html").read_text()
    card = json.loads(haori(capsys, "library", "show", kind, "--json").out)
    assert card["evaluations"][0]["metrics"]["accuracy"]["value"] == written["metrics"]["accuracy"]["value"]
    shown = haori(capsys, "library", "show", kind).out
    assert "MIT" in shown
    assert "commercial use" in shown
    assert kind in haori(capsys, "library", "list").out
    assert kind in haori(capsys, "library", "search", "MIT").out
    assert kind not in haori(capsys, "library", "search", "GPL").out


def test_export_merge_generate_and_remove(capsys, haori_home, tiny_base_folder, tmp_path):
    folder = stock_adapter(tiny_base_folder, tmp_path / "adapter")
    assert haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "a").code == 0
    assert haori(capsys, "library", "export", "a", "--out", tmp_path / "exported").code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    assert PeftModel.from_pretrained(model, tmp_path / "exported").peft_config["default"].r == 4
    done = haori(capsys, "merge", "a", "--out", tmp_path / "merged", "--dtype", "fp16")
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float16
    done = haori(capsys, "generate-text", "a", "--prompt", "hello", "--max-tokens", 3)
    assert done.code == 0, done.err
    again = haori(capsys, "merge", "a", "--out", tmp_path / "merged")
    assert again.code == 2
    assert "not an empty folder" in again.err
    assert haori(capsys, "library", "remove", "a").code == 0
    gone = haori(capsys, "chat", "a")
    assert gone.code == 2
    assert gone.err.startswith("Error: ")
    assert haori(capsys, "library", "rebuild").out.strip() == "The index holds 0 adapters."


def test_chat_switches_the_adapter_off_and_on(capsys, monkeypatch, haori_home, tiny_base_folder, tmp_path):
    folder = stock_adapter(tiny_base_folder, tmp_path / "adapter")
    assert haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "a").code == 0
    said = iter(["hello", "/base", "/reset", "hello", "/what", "x " * 400, "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    done = haori(capsys, "chat", "a", "--max-tokens", 4)
    assert done.code == 0, done.err
    assert "now talking to the bare base" in done.out
    assert "conversation forgotten" in done.out
    assert "/reset begins a" in done.out


def damage(folder: Path, kind: str) -> None:
    weights = folder / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 2 << 30) + b"{" * 100)
    elif kind == "pickle":
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    elif kind == "disguised":
        weights.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "truncated"),
        ("header", "2,147,483,648"),
        ("pickle", "safetensors"),
        ("disguised", "Python pickle"),
    ],
)
def test_a_damaged_adapter_is_refused(capsys, haori_home, tiny_base_folder, tmp_path, kind, said):
    folder = stock_adapter(tiny_base_folder, tmp_path / "adapter")
    damage(folder, kind)
    done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "bad")
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list((haori_home / "library").rglob("*.safetensors"))


def test_an_adapter_that_does_nothing_fails_its_proof(capsys, haori_home, tiny_base_folder, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder), config).save_pretrained(tmp_path / "zero")
    done = haori(capsys, "library", "add", tmp_path / "zero", "--base", tiny_base_folder, "--name", "zero")
    assert done.code == 1
    assert "not changed at all" in done.err
    assert haori(capsys, "library", "show", "zero").code == 2


def test_another_base_is_refused_with_both_fingerprints(capsys, haori_home, tiny_base_folder, tmp_path):
    folder = stock_adapter(tiny_base_folder, tmp_path / "adapter")
    assert haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "a").code == 0
    others = {
        "weights": build_tiny_base(tmp_path / "w", seed=9),
        "structure": build_tiny_base(tmp_path / "s", layers=3),
    }
    for kind, base in others.items():
        done = haori(capsys, "generate-text", "a", "--prompt", "x", "--base", base, "--max-tokens", 2)
        assert done.code == 2
        assert "fingerprint" in done.err
        allowed = haori(
            capsys,
            "generate-text",
            "a",
            "--prompt",
            "x",
            "--base",
            base,
            "--max-tokens",
            2,
            "--allow-different-weights",
        )
        assert allowed.code == (0 if kind == "weights" else 2), allowed.err


def test_verifying_again_keeps_what_only_the_run_could_check(capsys, haori_home, tiny_base_folder, reviews):
    words = ["train", "--base", tiny_base_folder, "--data", reviews, "--name", "a", "--set", "training.epochs=1"]
    assert haori(capsys, *words, "--set", "training.gradient_checkpointing=true").code == 0
    done = haori(capsys, "library", "verify", "a")
    assert done.code == 0, done.err
    assert "skipped" not in done.out
    assert "chat template" in done.out
    card = json.loads(haori(capsys, "library", "show", "a", "--json").out)
    assert [check["name"] for check in card["verification"]["checks"]][-1] == "chat template"


def test_evaluation_on_the_training_data_says_so(capsys, haori_home, tiny_base_folder, reviews, tmp_path):
    words = ["train", "--base", tiny_base_folder, "--data", reviews, "--name", "a", "--set", "training.epochs=1"]
    assert haori(capsys, *words).code == 0
    other = tmp_path / "other.jsonl"
    other.write_text(reviews.read_text().replace("film", "book"))
    said = "was trained on"
    assert said in haori(capsys, "evaluate", "a", "--data", reviews, "--samples", 0).out
    assert said not in haori(capsys, "evaluate", "a", "--data", other, "--samples", 0).out
