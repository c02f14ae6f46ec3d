"""The losses of an objective, over all processes: what a validation measures."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from haori.core.errors import TrainingError
from haori.data.batching import plan_batches
from haori.tasks.task import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Means", "mean_losses"]


class Means(NamedTuple):
    """What was measured.

    Attributes:
        values: Means over what counts in the rows: `loss`, and what the objective sums besides.
        each: The mean loss of each picture; empty for objectives without `rows_of_each`.
    """

    values: dict[str, float]
    each: tuple[float, ...] = ()


@torch.no_grad()
def mean_losses(
    accelerator: "Accelerator", wrapped: Any, objective: Objective | None, budget: int, step: int
) -> Means | None:
    """Measure the losses of an objective's rows.

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
    together: int = getattr(objective, "rows_of_each", 0)
    by_row = torch.zeros(len(objective.costs), dtype=torch.float64)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        loss = objective.loss(wrapped, objective.batch(rows, device))
        also = {name: float(value) for name, value in loss.also.items()}
        for name, value in {"count": float(loss.count), "loss": float(loss.total), **also}.items():
            sums[name] = sums.get(name, 0.0) + value
        if together:
            by_row.index_add_(0, torch.tensor(rows)[loss.row_of.cpu()], loss.each.cpu().double())
    names = _names_of_all(accelerator, sums)
    mine = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
    total = dict(zip(names, accelerator.reduce(mine.to(device), "sum").tolist(), strict=True))
    if not math.isfinite(total["loss"]):
        raise TrainingError(f"The validation loss became {total['loss']} at step {step}; lower optimizer.lr.")
    count = total.pop("count")
    each: tuple[float, ...] = ()
    if together:
        each = tuple(accelerator.reduce(by_row.to(device), "sum").view(-1, together).mean(1).tolist())
    return Means({name: value / count for name, value in total.items()}, each)


def _names_of_all(accelerator: "Accelerator", sums: dict[str, float]) -> list[str]:
    """Return the names that any process has sums of; a process may have had no rows."""
    if accelerator.num_processes == 1:
        return list(sums)
    from accelerate.utils import gather_object

    return sorted({"count", "loss", *gather_object(list(sums))})
