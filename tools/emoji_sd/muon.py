"""Muon: momentum whose matrices are made orthogonal, for the weights of linears and convolutions.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the size of an update is matched to
Adam's as in Liu et al., "Muon is scalable for LLM training" (2025, arXiv 2502.16982): 0.2 sqrt(max(rows, columns)).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Muon", "orthogonal"]


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of a matrix by about 1, by the quintic Newton-Schulz iteration in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over parameters of two or more dimensions; further ones are flattened.

    Processes that train together hold the same gradients. Each makes its part of the matrices orthogonal, which is
    half of the time of a small step, and sends the updates to the others.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.rank, self.world = rank, world
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        self.owners = _owners([parameter.flatten(1).shape for parameter in every], world)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
        owners = iter(self.owners)
        for group in self.param_groups:
            moved = [(parameter, next(owners)) for parameter in group["params"]]
            moved = [(parameter, owner) for parameter, owner in moved if parameter.grad is not None]
            updates = [
                torch.cat(
                    [self._update(parameter, group["momentum"], owner) for parameter, owner in moved if owner == rank]
                )
                for rank in range(self.world)
            ]
            if self.world > 1:
                for rank, update in enumerate(updates):
                    dist.broadcast(update.view(torch.uint8), rank)
            places = [0] * self.world
            for parameter, owner in moved:
                end = places[owner] + parameter.numel()
                update = updates[owner][places[owner] : end].view_as(parameter)
                places[owner] = end
                size = 0.2 * max(parameter.flatten(1).shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * size)

    def _update(self, parameter: Tensor, momentum: float, owner: int) -> Tensor:
        """The flat orthogonal update in bf16, or room for one that another process computes."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        if owner != self.rank:
            return torch.empty(parameter.numel(), dtype=torch.bfloat16)
        return orthogonal(torch.lerp(parameter.grad, state["momentum"], momentum).flatten(1)).flatten()


def _owners(shapes: list[torch.Size], world: int) -> list[int]:
    """Which process makes which matrix orthogonal, so that the work is even."""
    loads, owners = [0] * world, [0] * len(shapes)
    for place in sorted(range(len(shapes)), key=lambda place: -_work(shapes[place])):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += _work(shapes[place])
    return owners


def _work(shape: torch.Size) -> int:
    rows, columns = sorted(shape)
    return rows * rows * (2 * columns + rows)
