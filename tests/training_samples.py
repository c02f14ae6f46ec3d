"""A loop on the tiny base, made without data files or the command line, for tests of what training computes."""

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset

from haori.adapters.insertion import Insertion
from haori.adapters.methods import insert_method
from haori.tasks.causal_lm import TASK
from haori.tasks.causal_lm.objective import CausalLmObjective
from haori.tasks.recipe import Recipe, recipe_from
from haori.tasks.task import Choice
from haori.training.auto import resolve
from haori.training.batches import count_steps
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


def resolve_all(
    given: Recipe, lengths: list[int], parameters: int, dtype: tuple[str, str]
) -> tuple[Recipe, list[Choice]]:
    """Resolve every `auto`, as preparing a run on a CPU does, for rows of these lengths and a base of 2,048 tokens."""
    split = SimpleNamespace(train={"length": lengths}, validation={"length": []})
    with_budgets, of_task = TASK.resolve(given, split, SimpleNamespace(context_length=2048), "cpu")
    resolved, choices = resolve(with_budgets, len(lengths), parameters, dtype)
    return resolved, [*choices, *of_task]


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
    batches = [CausalLmObjective(train, 0).batch(range(len(train)))]
    inputs = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    start = Insertion(made.training.seed, count_steps(list(train["length"]), made.training), inputs, "CAUSAL_LM")
    adapted = insert_method(model, AutoTokenizer.from_pretrained(base), made.method, TARGETS, start)
    torch.manual_seed(made.training.seed)
    return Loop(
        accelerator, adapted, TASK, CausalLmObjective(train, 0),
        CausalLmObjective(validation, 0) if validation else None, made,
        folder,
        Measurements(folder / "metrics.jsonl", done), "tiny",
    )  # fmt: skip
