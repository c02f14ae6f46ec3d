"""One tenant: its LoRA factors, the gradients summed up since the last step, and its AdamW."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from haori.core.client_runs import ClientRun
from haori.core.errors import InputError, TrainingError
from haori.jobs.tenants.history import Runs, stepped
from haori.jobs.tenants.records import AdamParams, AdapterSpec

__all__ = ["Gradients", "LoraPair", "Tenant", "added"]

Gradients = dict[str, tuple[Tensor, Tensor]]
"""(dA, dB) by full module name."""


def added(total: Gradients | None, more: Gradients) -> Gradients:
    """Return a sum of gradients with more added to it in place; the first of them begin it, and are given away."""
    if total is None:
        return more
    for name, (da, db) in more.items():
        total[name][0].add_(da)
        total[name][1].add_(db)
    return total


@dataclass(frozen=True)
class LoraPair:
    """Factors of one module in fp32: `a` is [R, in], `b` [out, R], and `scale` multiplies B A."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float


@dataclass
class Tenant:
    """An adapter under training."""

    name: str
    spec: AdapterSpec
    factors: Mapping[str, LoraPair]
    gradients: Gradients | None = None
    tokens: int = 0
    steps: int = 0
    runs: Runs = (ClientRun(),)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of every module, in the order of the model."""
        return [factor for pair in self.factors.values() for factor in (pair.a, pair.b)]

    @property
    def size_bytes(self) -> int:
        """Memory of the factors."""
        return sum(factor.nbytes for factor in self.parameters)

    def accumulate(self, gradients: Gradients) -> None:
        """Add the gradients of one operation, which are given away."""
        self.gradients = added(self.gradients, gradients)

    def step(self, params: AdamParams) -> dict[str, float]:
        """Apply the gradients summed up so far, and forget them.

        Raises:
            InputError: There are none.
            TrainingError: Their sum is not finite. It is forgotten, and the adapter stays as it is.
        """
        if self.gradients is None:
            raise InputError(
                f"{self.name!r} has no gradients to apply: call forward_backward before optim_step, and see that it "
                "succeeded."
            )
        for name, pair in self.factors.items():
            pair.a.grad, pair.b.grad = self.gradients[name]
        self.gradients = None
        try:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
            if not math.isfinite(norm):
                raise TrainingError(
                    f"The gradients of {self.name!r} sum up to {norm}, so the step was not made and they were "
                    "forgotten; lower the weights or advantages, or the learning rate before it."
                )
            if params.grad_clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, params.grad_clip_norm, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group.update(
                    lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps,
                    weight_decay=params.weight_decay,
                )  # fmt: skip
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.runs = stepped(self.runs, params)
        return {"grad_norm": norm, "step": float(self.steps), "learning_rate": params.learning_rate}
