"""A loop on the tiny base, made without data files or the command line, for tests of what training computes."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset

from haori.adapters.insertion import Start
from haori.adapters.methods import insert_method
from haori.core.recipe import Recipe, recipe_from
from haori.training.batches import count_steps
from haori.training.causal_lm import CausalLM
from haori.training.loop import Loop
from haori.training.measurements import Measurements

TARGETS = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]


def rows(n: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    made = {"input_ids": [], "labels": [], "origin": [], "length": []}
    for i in range(n):
        length = int(torch.randint(6, 20, (), generator=generator))
        ids = torch.randint(5, 200, (length,), generator=generator).tolist()
        made["input_ids"].append(ids)
        made["length"].append(length)
        made["labels"].append([-100] * (length - 3) + [7, 9, 2])
        made["origin"].append(f"data.jsonl:{i + 1}")
    return Dataset.from_dict(made)


def recipe(*overrides: str) -> Recipe:
    fixed = [
        "method.rank=4", "method.alpha=8", "optimizer.lr=5e-3", "training.epochs=3", "training.batch_tokens=120",
        "training.micro_batch_tokens=60", "training.dtype=fp32",
        "training.evaluations_per_epoch=1",
    ]  # fmt: skip
    return recipe_from({"name": "t", "base": "b", "data": {"path": "p"}}, [*fixed, *overrides])


def make_loop(
    base: Path,
    folder: Path,
    made: Recipe,
    train: Dataset,
    validation: Dataset | None,
    done: int = 0,
    accelerator: Accelerator | None = None,
) -> Loop:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(exist_ok=True)
    if accelerator is None:
        AcceleratorState._reset_state()  # another test's precision would be inherited
        accelerator = Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    batches = [CausalLM(train, 0).batch(range(len(train)))]
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    start = Start(made.training.seed, count_steps(list(train["length"]), made.training), inputs)
    adapted = insert_method(model, AutoTokenizer.from_pretrained(base), made.method, TARGETS, start)
    torch.manual_seed(made.training.seed)
    return Loop(
        accelerator, adapted, CausalLM(train, 0), CausalLM(validation, 0) if validation else None, made,
        folder,
        Measurements(folder / "metrics.jsonl", None, done), "tiny",
    )  # fmt: skip
