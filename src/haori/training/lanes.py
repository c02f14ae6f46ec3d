"""Two halves of a microbatch side by side, each in a thread with half of the processor's cores.

Operations of a small model are short; with all cores on one operation, they wait for one another between any two. Two
lanes on two cores trained SmolLM2 a tenth to a fifth faster than one on both (docs/log.md). Gradients are those of the
whole microbatch and are added in a fixed order, so a run stays exactly repeatable.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haori.adapters.fused import runs_as_a_whole
from haori.tasks.task import LossSum, Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Lanes", "lanes_for"]

_COUNT = 2


class Lanes:
    """Threads that share the cores among them.

    Args:
        cores: Threads that torch may use in all.
    """

    def __init__(self, cores: int) -> None:
        started = Barrier(_COUNT + 1)

        def begin() -> None:
            torch.set_num_threads(max(1, cores // _COUNT))  # of this thread, and the default of threads to come
            started.wait()

        self.pool = ThreadPoolExecutor(_COUNT, initializer=begin)
        for _ in range(_COUNT):
            self.pool.submit(int)
        started.wait()
        torch.set_num_threads(cores)

    def backward(self, model: nn.Module, objective: Objective, batch: Any, scale: float) -> LossSum:
        """Add the gradient of `scale` times the summed loss to `.grad`, and return the loss without its graph."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows = [list(range(len(batch.rows)))[lane::_COUNT] for lane in range(_COUNT)]

        def work(places: list[int]) -> tuple[LossSum, Sequence[Tensor | None]]:
            loss = objective.loss(model, objective.part(batch, places))
            if not len(loss.each):
                return loss, [None] * len(parameters)
            return loss, torch.autograd.grad(loss.total * scale, parameters, allow_unused=True)

        found = list(self.pool.map(work, rows))
        for index, parameter in enumerate(parameters):
            for _, gradients in found:
                gradient = gradients[index]
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        losses = [loss for loss, _ in found]
        return LossSum(
            torch.stack([loss.total.detach() for loss in losses]).sum(),
            sum(loss.count for loss in losses),
            torch.cat([loss.each for loss in losses]),
            torch.cat([torch.tensor(places)[loss.row_of] for places, loss in zip(rows, losses, strict=True)]),
        )


def lanes_for(accelerator: "Accelerator", model: nn.Module, objective: Objective, *, recomputes: bool) -> Lanes | None:
    """Return lanes where they help and change nothing; None on a GPU, with several processes, or for one core.

    Args:
        accelerator: Of the run.
        model: With its adapters; where it draws dropout, two threads would draw in no fixed order.
        objective: Of the training rows.
        recomputes: Whether activations are computed again in backward.
    """
    cores = torch.get_num_threads()
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1 and cores >= _COUNT
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if not alone or draws or recomputes or not objective.separable or not runs_as_a_whole(model):
        return None
    return Lanes(cores)
