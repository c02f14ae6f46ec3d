"""`--dry-run`: what a run would do, with time and memory measured on its first batch rather than guessed."""

import time
from typing import NamedTuple

from haori.tasks.task import Choice
from haori.training.batches import epoch_steps
from haori.training.fast_path import fast_path
from haori.training.memory import peak_memory_bytes
from haori.training.out_of_memory import explaining_memory
from haori.training.preparation import Prepared, adapted_model, planned_steps, total_parameters

__all__ = ["Plan", "make_plan"]

_ADAM_BYTES_PER_PARAMETER = 8  # two fp32 moments


class Plan(NamedTuple):
    """The plan of a run. Time and memory are extrapolated from one measured microbatch."""

    choices: tuple[Choice, ...]
    trainable_parameters: int
    total_parameters: int
    target_modules: int
    steps: int
    cost_per_epoch: int
    unit: str
    epochs: int
    seconds: float
    peak_memory_bytes: int


def make_plan(prepared: Prepared) -> Plan:
    """Load the base, insert adapters, run the largest microbatch forward and backward twice, and extrapolate.

    Leaves nothing on disk besides caches.
    """
    import torch

    training = prepared.recipe.training
    assert training.epochs != "auto"
    objective = prepared.train
    steps = epoch_steps(objective.costs, training, 0)
    largest = max(
        (micro for step in steps for micro in step),
        key=lambda rows: len(rows) * max(objective.costs[r] for r in rows),
    )
    padded = len(largest) * max(objective.costs[row] for row in largest)
    prepared.task.ready(prepared.recipe, prepared.base, prepared.processor, prepared.split, prepared.device)
    batch = objective.batch(largest, prepared.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.dtype)
    seconds = 0.0
    with explaining_memory(prepared) as watched:
        watched.model = model = adapted_model(prepared, prepared.device)
        with fast_path(model, mixed=dtype is not None):
            model.train()
            for _ in range(2):  # the first pass also pays for what torch prepares once
                started = time.perf_counter()
                with torch.autocast(prepared.device, dtype=dtype, enabled=dtype is not None):
                    loss = objective.loss(model, batch)
                loss.total.backward()  # type: ignore[no-untyped-call]
                seconds = time.perf_counter() - started
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = sum(objective.costs)
    total_steps = planned_steps(prepared)
    share = total_steps / max(1, len(steps))
    return Plan(
        choices=prepared.choices,
        trainable_parameters=trainable,
        total_parameters=total_parameters(prepared, trainable),
        target_modules=len(prepared.targets),
        steps=total_steps,
        cost_per_epoch=cost,
        unit=prepared.task.unit,
        epochs=training.epochs,
        seconds=seconds / padded * cost * share,
        peak_memory_bytes=peak_memory_bytes(prepared.device) + _ADAM_BYTES_PER_PARAMETER * trainable,
    )
