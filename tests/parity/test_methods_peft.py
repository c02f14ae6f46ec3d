"""Every method in our loop against stock PEFT in a plain one: same start, same batches, fp32, the same weights after.

AdamW divides tiny gradients by their own size, which turns rounding into whole steps; a larger eps prevents that.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from haori.tasks.causal_lm.objective import CausalLmObjective
from haori.training.loop import Loop
from haori.training.schedule import rate_at
from haori.training.signals import StopRequest
from tests.training_samples import TARGETS, make_loop, recipe, rows

STEPS = 8
COMMON: dict[str, Any] = {"lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
SETTINGS = (
    "training.batch_tokens=100000", "training.micro_batch_tokens=60", "training.epochs=8", "optimizer.eps=1e-3",
    "optimizer.max_grad_norm=0.5",
)  # fmt: skip
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, **COMMON),
    "lora+": lambda: LoraConfig(r=4, **COMMON),
    "rslora": lambda: LoraConfig(r=4, use_rslora=True, **COMMON),
    "patterns": lambda: LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 16}, **COMMON),
    "orthogonal": lambda: LoraConfig(r=4, init_lora_weights="orthogonal", **COMMON),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **COMMON),
    "adalora": lambda: AdaLoraConfig(
        init_r=6, target_r=4, tinit=2, tfinal=2, total_step=STEPS, orth_reg_weight=0.3, **COMMON
    ),
}
METHODS = {
    "lora": (),
    "lora+": ("method.lr_ratio=16",),
    "rslora": ("method.rslora=true",),
    "patterns": ("method.rank_pattern.q_proj=2", "method.alpha_pattern.down_proj=16"),
    "orthogonal": ("method.init=orthogonal",),
    "dora": ("method.kind=dora",),
    "adalora": (
        "method.kind=adalora", "method.initial_rank=6", "method.warmup=0.25", "method.settle=0.25",
        "method.orthogonality=0.3",
    ),
}  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def plain_loop(name: str, base: Path, loop: Loop) -> Any:
    """Train as PEFT's documentation does: full logits, the model's own loss, one batch of all rows."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), CONFIGS[name]()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": 5e-3, "eps": 1e-3, "weight_decay": 0.0}
    if name == "lora+":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=16, **options)
    else:
        optimizer = torch.optim.AdamW(trained, **options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    batch = loop.train.batch(range(len(loop.train.costs)))
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = rate_at(step, STEPS, peak, loop.recipe.schedule)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_trains_what_stock_peft_trains(name: str, tiny_base_folder: Path, tmp_path: Path):
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe(*SETTINGS, *METHODS[name]), rows(12), None)
    before = {key: value.clone() for key, value in weights(loop.model).items()}
    ended = loop.run(StopRequest())
    assert ended.step == STEPS
    theirs = weights(plain_loop(name, tiny_base_folder, loop))
    ours = weights(loop.model)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-6)
        assert tensor.shape != before[key].shape or not torch.equal(tensor, before[key]), f"{key} never moved"


RESIDUAL = {
    "pissa": (),
    "olora": ("method.rslora=true", "method.rank_pattern.q_proj=2"),  # PEFT's own conversion does not cover these
}


@pytest.mark.parametrize("start", RESIDUAL)
def test_residual_starts_are_those_of_peft_and_end_on_the_base_itself(
    start: str, tiny_base_folder: Path, tmp_path: Path
):
    """What is stored at the end is a plain LoRA that computes over the untouched base what was trained."""
    untouched = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    loop = make_loop(
        tiny_base_folder, tmp_path / "run", recipe(*SETTINGS, f"method.init={start}", *RESIDUAL[start]), rows(12), None
    )
    torch.manual_seed(0)
    options: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"q_proj": 2}} if RESIDUAL[start] else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, init_lora_weights=start, **options, **COMMON)
    stock = weights(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32), config))
    for key, mine in weights(loop.model).items():
        torch.testing.assert_close(mine, stock[key])
    loop.behaviour.finish, finish = lambda: None, loop.behaviour.finish
    loop.run(StopRequest())
    with torch.no_grad():
        trained, base = loop.model.eval()(ids).logits, untouched(ids).logits
        assert (trained - base).abs().max() > 1e-3
        finish()
        torch.testing.assert_close(loop.model.eval()(ids).logits, trained, rtol=1e-4, atol=1e-5)
        with loop.model.disable_adapter():
            torch.testing.assert_close(loop.model(ids).logits, base, rtol=1e-4, atol=1e-5)
        loop.model.save_pretrained(tmp_path / "stored", save_embedding_layers=False)
        reloaded = PeftModel.from_pretrained(untouched, tmp_path / "stored").eval()
        torch.testing.assert_close(reloaded(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_eva_starts_from_the_inputs_of_each_layer(tiny_base_folder: Path, tmp_path: Path):
    """A is what stock PEFT finds on the same batch, B is zero, and all ranks together are as many as asked for."""
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    data = rows(30)
    loop = make_loop(tiny_base_folder, tmp_path / "run", recipe("method.init=eva"), data, None)
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights="eva", eva_config=EvaConfig(), **COMMON)
    with pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        stock = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32), config)
    batch = CausalLmObjective(data, 0).batch(range(30))
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}]
    initialize_lora_eva_weights(stock, inputs, show_progress_bar=False)
    ours, theirs = weights(loop.model), weights(stock)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key])
        assert "lora_A" in key or not tensor.any()
    assert sum(len(tensor) for key, tensor in ours.items() if "lora_A" in key) == 4 * len(TARGETS)
