"""An adapter to GGUF and back through the command line, and values that are refused on the way in."""

import json

import torch

from haori.bases import find_base
from haori.library import Library, attach, live_probe_logits
from tests.command_line import haori
from tests.library_samples import PROBES, change_tensors, stock_logits, stock_lora


def test_an_adapter_goes_to_llama_cpp_and_comes_back(tiny_base_folder, tmp_path, capsys):
    targets = ["q_proj", "k_proj", "down_proj"]
    folder = stock_lora(tiny_base_folder, tmp_path / "peft", target_modules=targets, alpha_pattern={"k_proj": 3})
    expected = stock_logits(tiny_base_folder, folder)
    base = ("--base", tiny_base_folder)
    assert haori(capsys, "library", "add", folder, *base, "--name", "first").code == 0
    done = haori(capsys, "library", "export", "first", "--out", tmp_path / "out.gguf", "--format", "gguf", *base)
    assert done.code == 0, done.err
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
    back = haori(capsys, "library", "add", tmp_path / "out.gguf", *base, "--name", "second")
    assert back.code == 0, back.err
    stored = Library().get("second")
    found = live_probe_logits(attach(find_base(str(tiny_base_folder)), stored.path, dtype="fp32"), PROBES)
    assert max(float((one - two).abs().max()) for one, two in zip(found, expected, strict=True)) < 1e-5
    config = json.loads((stored.path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and len(config["target_modules"]) == 6


def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_written(tiny_base_folder, tmp_path, capsys):
    folder = stock_lora(tiny_base_folder, tmp_path / "peft", use_dora=True)
    assert haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "dora").code == 0
    out = tmp_path / "out.gguf"
    done = haori(capsys, "library", "export", "dora", "--out", out, "--format", "gguf", "--base", tiny_base_folder)
    assert done.code == 2 and "has a magnitude (DoRA)" in " ".join(done.err.split()) and not out.exists()


def test_values_that_no_training_gives_are_not_added(tiny_base_folder, tmp_path, capsys):
    folder = stock_lora(tiny_base_folder, tmp_path / "peft")

    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = torch.inf

    change_tensors(folder, spoil)
    done = haori(capsys, "library", "add", folder, "--base", tiny_base_folder, "--name", "bad")
    assert done.code == 2 and "holds NaN or infinity" in " ".join(done.err.split())
    assert list(Library().list()) == []
