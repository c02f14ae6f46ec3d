"""Each method through the command line: trained, proved, stored, reloaded by stock PEFT with equal logits, merged."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import haori
from haori.library import live_probe_logits
from haori.tasks.recipe import kept_recipe
from tests.command_line import haori as haori_command
from tests.library_samples import PROBES, stock_logits

LORA = ("method.rank=4",)
METHODS: dict[str, tuple[str, ...]] = {
    "lora+ with rslora": (*LORA, "method.lr_ratio=16", "method.rslora=true"),
    "layers and patterns": (
        *LORA,
        "method.layers=[1]",
        "method.rank_pattern.q_proj=2",
        "method.alpha_pattern.up_proj=4",
    ),
    "norms": (*LORA, "method.train_norms=true"),
    "embedding": (*LORA, "method.target=[embed_tokens, q_proj]"),
    "biases": (*LORA, "method.bias=adapted"),
    "pissa": (*LORA, "method.init=pissa"),
    "olora": (*LORA, "method.init=olora"),
    "eva": (*LORA, "method.init=eva"),
    "orthogonal": (*LORA, "method.init=orthogonal"),
    "dora": ("method.kind=dora", *LORA),
    "adalora": ("method.kind=adalora", "method.rank=1", "method.initial_rank=3"),
    "ia3": ("method.kind=peft", "method.type=ia3"),
    "loha": ("method.kind=peft", "method.type=LOHA", "method.options.r=4"),
    "norm tuning": ("method.kind=peft", "method.type=ln_tuning"),
    "prefix": ("method.kind=peft", "method.type=prefix_tuning", "method.options.num_virtual_tokens=4"),
}
NOT_MERGED = {"prefix"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def biased_base(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with biases in its attention, as Qwen2 has them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biased")
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    torch.manual_seed(0)
    biased = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "attention_bias": True}))
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base_folder).save_pretrained(folder)
    return folder


def difference(first: Any, second: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_from_data_to_a_merged_model(
    capsys: Any, haori_home: Path, tiny_base_folder: Path, biased_base: Path, data: Path, tmp_path: Path, name: str
):
    base = biased_base if name == "biases" else tiny_base_folder
    settings = ("training.epochs=1", "training.dtype=fp32", "training.batch_tokens=120", *METHODS[name])
    done = haori_command(
        capsys, "train", "--base", base, "--data", data, "--name", "m", "--out", tmp_path / "out",
        *(word for setting in settings for word in ("--set", setting)),
    )  # fmt: skip
    assert done.code == 0, done.err
    card = haori.Library().get("m").card
    assert card.verification is not None
    assert card.verification.passed
    kept = kept_recipe(card)
    assert kept is not None
    assert kept.method.kind == next((s[12:] for s in METHODS[name] if s.startswith("method.kind=")), "lora")
    assert card.run is not None
    assert bool(card.run.ranks) == (name == "adalora")
    opened = haori.open_adapter("m", dtype="fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(live_probe_logits(opened.model, PROBES), stock_logits(base, tmp_path / "out")) == 0.0
    merged = haori_command(capsys, "merge", "m", "--out", tmp_path / "merged")
    assert merged.code == (2 if name in NOT_MERGED else 0), merged.err
    if name == "biases":
        assert "q_proj.base_layer.bias" in str(haori.library.inspect_adapter(tmp_path / "out").tensors.keys())


def test_a_residual_start_is_stored_as_a_plain_lora(haori_home: Path, tiny_base_folder: Path, data: Path):
    """Switching it off gives the base back, so an evaluation needs no second copy of it."""
    overrides = ["method.init=pissa", "method.rank=4", "training.epochs=1", "training.dtype=fp32"]
    run = haori.train(base=str(tiny_base_folder), data=str(data), name="m", overrides=overrides, progress=False)
    assert run.adapter is not None
    config = json.loads((run.adapter.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16.0, True)
    assert run.record.trainable_parameters * 2 == run.adapter.card.trainable_parameters
    opened = haori.open_adapter("m", dtype="fp32")
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    with opened.strength(on=False):
        assert difference(live_probe_logits(opened.model, PROBES), live_probe_logits(bare, PROBES)) == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.init=zeros"], "both their gradients are zero"),
        (["method.init=pissa", "training.dtype=bf16"], "Use training.dtype=fp32"),
        (["method.layers=[7]"], "the layer 7, which holds no target; targets are in the layers 0 to 1"),
        (["method.kind=adalora", "training.max_steps=1"], "1 optimizer steps are too few for AdaLoRA's schedule"),
        (["method.kind=adalora", "method.rank=8", "method.initial_rank=8"], "must be larger than method.rank"),
        (["method.kind=peft", "method.type=LOAH"], "did you mean 'LOHA'"),
        (["method.init=eva", "method.rank=16", "training.micro_batch_tokens=20"], "at least 32 tokens"),
    ],
)  # fmt: skip
def test_a_misfit_is_a_sentence_and_leaves_nothing(capsys, haori_home, tiny_base_folder, data, settings, said):
    done = haori_command(
        capsys, "train", "--base", tiny_base_folder, "--data", data, "--name", "m",
        *(word for setting in settings for word in ("--set", setting)),
    )  # fmt: skip
    assert done.code == 2, done
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (haori_home / "library").exists()
    assert not (haori_home / "runs").exists()


@pytest.mark.parametrize("name", ["adalora", "ia3", "eva"])
def test_a_method_trains_under_autocast(haori_home: Path, tiny_base_folder: Path, data: Path, name: str):
    """Adapters are fp32 over a base in 16 bits, and what is reloaded is what was trained, to the last bit."""
    overrides = ["training.epochs=1", "training.batch_tokens=120", "training.dtype=bf16", *METHODS[name]]
    run = haori.train(base=str(tiny_base_folder), data=str(data), name="m", overrides=overrides, progress=False)
    assert run.adapter is not None
    assert run.adapter.card.verification is not None
    checks = {check.name: check for check in run.adapter.card.verification.checks}
    assert checks["reload"].value == 0.0
    from safetensors.torch import load_file

    tensors = load_file(run.adapter.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
