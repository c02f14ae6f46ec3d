"""The means of the losses of an objective, over all processes: what a validation measures."""

import math
from typing import TYPE_CHECKING, Any

import torch

from haori.core.errors import TrainingError
from haori.data.batching import plan_batches
from haori.tasks.task import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["mean_losses"]


@torch.no_grad()
def mean_losses(
    accelerator: "Accelerator", wrapped: Any, objective: Objective | None, budget: int, step: int
) -> dict[str, float] | None:
    """Return the means over what counts in the rows: `loss`, and what the objective sums besides.

    Args:
        accelerator: Of the run.
        wrapped: The model, wrapped by it.
        objective: Of the rows; None, or one without rows, has no means.
        budget: What a microbatch may cost.
        step: For the message.

    Raises:
        TrainingError: The loss is not finite.
    """
    if objective is None or not len(objective.costs):
        return None
    wrapped.eval()
    device = accelerator.device
    batches = plan_batches(objective.costs, budget)
    sums: dict[str, float] = {}
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        loss = objective.loss(wrapped, objective.batch(rows, device))
        also = {name: float(value) for name, value in loss.also.items()}
        for name, value in {"count": float(loss.count), "loss": float(loss.total), **also}.items():
            sums[name] = sums.get(name, 0.0) + value
    names = _names_of_all(accelerator, sums)
    mine = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    total = dict(zip(names, accelerator.reduce(mine.to(device), "sum").tolist(), strict=True))
    if not math.isfinite(total["loss"]):
        raise TrainingError(f"The validation loss became {total['loss']} at step {step}; lower optimizer.lr.")
    count = total.pop("count")
    return {name: value / count for name, value in total.items()}


def _names_of_all(accelerator: "Accelerator", sums: dict[str, float]) -> list[str]:
    """Return the names that any process has sums of; a process may have had no rows."""
    if accelerator.num_processes == 1:
        return list(sums)
    from accelerate.utils import gather_object

    return sorted({"count", "loss", *gather_object(list(sums))})
