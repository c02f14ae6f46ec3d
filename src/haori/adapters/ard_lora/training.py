"""How ranks are learnt: three stretches of a run, the penalty between, whole ranks at the end.

    warm-up   ranks rest at r0 while A and B take shape
    learning  gates are soft; L = L_task + sparsity * mean over heads of (a + variation |a - a of the step before|)
    settled   r = max(1, round(r0 a)) for good; A and B go on training under gates that are 0 or 1

The mean, not the sum, over heads: the cost of a rank then compares with the loss in nats whatever the size of the
model. The variation term is a subgradient against the direction of the last change, which damps oscillation.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from haori.adapters.ard_lora.gates import bounds, rounded_ranks
from haori.adapters.ard_lora.layer import ArdLoraLayer
from haori.adapters.ard_lora.tuner import ArdLoraModel
from haori.adapters.behaviour import Behaviour
from haori.core.errors import InputError
from haori.core.methods import ArdLoraMethod

__all__ = ["ArdLoraBehaviour", "behaviour"]

_ADAPTER = "default"


class ArdLoraBehaviour(Behaviour):
    """The behaviour of ARD-LoRA; see the module.

    Args:
        model: A PeftModel with ARD-LoRA in it.
        method: The resolved section of the recipe.
        steps: Planned number of optimizer steps.

    Raises:
        InputError: Warm-up and settling leave no step in which ranks could move.
    """

    def __init__(self, model: nn.Module, method: ArdLoraMethod, steps: int) -> None:
        super().__init__(model)
        self.method = method
        self.first = math.ceil(method.warmup * steps)
        self.last = steps - round(method.settle * steps)
        if self.last <= self.first:
            raise InputError(
                f"A run of {steps} optimizer steps leaves ARD-LoRA none in which ranks are learnt: {self.first} are "
                f"warm-up and {steps - self.last} have fixed ranks. Train longer, or lower method.settle."
            )
        self.start = self._tuner().peft_config[_ADAPTER].r
        layers = dict(self._layers())
        self.layers = list(layers.values())
        self.rhos = [layer.ard_rho[_ADAPTER] for layer in self.layers]
        self.before = self.now = self._factors().detach()
        self._enter(0)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return AdamW's groups; the rank factors have their own peak learning rate and do not decay."""
        gates = {id(rho) for rho in self.rhos}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in gates]
        return [
            {"params": rest, "weight_decay": weight_decay, "rate": 1.0},
            {"params": list(self.rhos), "weight_decay": 0.0, "rate": 1.0, "lr_peak": self.method.gate_lr},
        ]

    def penalty(self) -> torch.Tensor | None:
        """Return sparsity * mean(a + variation |a - a of the step before|) while ranks are learnt."""
        if not self.learning:
            return None
        a = self._factors()
        self.now = a.detach()
        return self.method.sparsity * (a + self.method.variation * (a - self.before).abs()).mean()

    def settled(self, step: int) -> bool:
        """Say whether the ranks after `step` are the final ones."""
        return step >= self.last

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep rank factors where they have an effect, at rest outside the learning stretch, and round them once."""
        if self.learning:
            self.before = self.now
            low, high = bounds(self.start)
            for rho in self.rhos:
                rho.clamp_(low, high)
            if step >= self.last:
                torch._foreach_copy_(self.rhos, rounded_ranks(self.rhos, self.start))
        else:
            torch._foreach_copy_(self.rhos, self.resting)  # AdamW's momentum would move them
        if step in {self.first, self.last}:
            self._enter(step)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the step and the rank factors a of the step before."""
        return {"step": torch.tensor(self.step), "before": self.before.clone()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; the model holds the rank factors of that step already."""
        self.before = tensors["before"].to(self.before.device)
        self._enter(int(tensors["step"]))

    def finish(self) -> None:
        """Prune: the factors shrink to the largest rank of a head, and the gates go into them."""
        self._tuner().prune(_ADAPTER)

    def ranks(self) -> dict[str, int | list[int]]:
        """Return the rank of each head by module, final after `finish`."""
        pruned = self._tuner().peft_config[_ADAPTER].head_ranks
        return dict(pruned or {name: layer.head_ranks(_ADAPTER) for name, layer in self._layers()})

    def _enter(self, step: int) -> None:
        """Set what the stretch that follows `step` needs."""
        self.step = step
        self.learning = self.first <= step < self.last
        self.resting = [rho.detach().clone() for rho in self.rhos]
        for layer in self.layers:
            layer.learning = self.learning

    def _factors(self) -> torch.Tensor:
        """Return a of every head of every module, one after the other."""
        return functional.softplus(torch.cat(list(self.rhos)))

    def _layers(self) -> Iterator[tuple[str, ArdLoraLayer]]:
        for name, module in self._tuner().model.named_modules():
            if isinstance(module, ArdLoraLayer):
                yield name, module

    def _tuner(self) -> ArdLoraModel:
        tuner = getattr(self.model, "base_model", None)
        assert isinstance(tuner, ArdLoraModel)
        return tuner


def behaviour(model: nn.Module, method: ArdLoraMethod, steps: int) -> ArdLoraBehaviour:
    """Return what ARD-LoRA adds to a step; see `behaviour_of`."""
    return ArdLoraBehaviour(model, method, steps)
