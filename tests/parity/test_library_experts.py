"""Mixtures whose experts are one parameter per layer: proved, merged, and not left out in silence."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper

from haori.bases import find_base
from haori.library import compare_logits, merge_adapter, verify_adapter
from haori.tasks.recipe import recipe_from
from haori.training.preparation import prepare
from tests.library_samples import run, save_stock, stock_model

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TARGETS = {
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "attention and experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
}


@pytest.fixture(scope="module")
def mixture(tiny_base_folder, tmp_path_factory) -> Path:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_local_experts=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock(mixture: Path, kind: str) -> object:
    return stock_model(mixture, LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS[kind]), scale=0.1)


@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_of_experts_are_proved_and_merged(kind, mixture, tmp_path):
    from transformers import AutoModelForCausalLM

    model = stock(mixture, kind)
    folder, expected = save_stock(model, tmp_path / "stock"), run(model)
    base = find_base(str(mixture))
    for dtype in ("fp32", "bf16"):
        found = verify_adapter(base, folder, dtype=dtype)
        assert found.passed, found.failures
    merged = merge_adapter(base, folder, tmp_path / "merged", dtype="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = AutoModelForCausalLM.from_pretrained(merged.path, dtype="float32").eval()
    assert compare_logits(expected, run(written)).rms < 0.02


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.9, 1.1, -1.0])
def test_lies_about_merging_experts_fail(factor, dtype, mixture, tmp_path, monkeypatch):
    folder = save_stock(stock(mixture, "attention and experts"), tmp_path / "stock")
    honest = ParamWrapper.get_delta_weight
    monkeypatch.setattr(
        ParamWrapper, "get_delta_weight", lambda self, *args, **kwargs: factor * honest(self, *args, **kwargs)
    )
    found = verify_adapter(find_base(str(mixture)), folder, dtype=dtype)
    assert [check.name for check in found.failures] == ["merge"]


def test_what_all_linear_leaves_out_is_said_before_training(mixture, tiny_base_folder, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Count to {n}.", "output": str(n)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def told(base: Path, *overrides: str) -> list[str]:
        recipe = recipe_from({"name": "t", "base": str(base), "data": {"path": str(path)}}, overrides)
        return [choice.reason for choice in prepare(recipe).choices if choice.key == "method.target"]

    (reason,) = told(mixture)
    assert "experts are NOT adapted: 4 parameters such as model.layers.0.mlp.experts.gate_up_proj" in reason
    experts = 2 * 16 * 3 * 32 * 48
    from transformers import AutoModelForCausalLM

    total = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(mixture).parameters())
    assert f"{experts / total:.0%} of the weights" in reason
    assert told(mixture, "method.target=attention") == told(tiny_base_folder) == []
