"""An average of the trained weights over the steps, which is smoother than the last of them.

a_t = d a_(t-1) + (1 - d) w_t, with d = min(decay, (1 + t) / (10 + t)) so that the start weighs little after a few
steps (as in TensorFlow's ExponentialMovingAverage and diffusers' EMAModel). Kept in fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from haori.adapters.behaviour import Behaviour

__all__ = ["Average"]

_PREFIX = "ema."


class Average(Behaviour):
    """Adds the average to what a method does at each step.

    Args:
        method: The behaviour of the method.
        decay: Greatest weight of the past.
    """

    def __init__(self, method: Behaviour, decay: float) -> None:
        super().__init__(method.model)
        self.method, self.decay = method, decay
        self.averages = {
            name: parameter.detach().float().clone()
            for name, parameter in method.model.named_parameters()
            if parameter.requires_grad
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the method's groups."""
        return self.method.parameter_groups(weight_decay)

    def penalty(self) -> torch.Tensor | None:
        """Return the method's penalty."""
        return self.method.penalty()

    def settled(self, step: int) -> bool:
        """Ask the method."""
        return self.method.settled(step)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Let the method act, then move the average."""
        self.method.after_step(step)
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters():
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the averages beside what the method keeps."""
        return self.method.state() | {f"{_PREFIX}{name}": value for name, value in self.averages.items()}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore both."""
        for name, value in self.averages.items():
            value.copy_(tensors[f"{_PREFIX}{name}"])
        self.method.load_state({key: value for key, value in tensors.items() if not key.startswith(_PREFIX)})

    def finish(self) -> None:
        """Put the averages in the model for good."""
        self._put_in()
        self.method.finish()

    def ranks(self) -> dict[str, int | list[int]]:
        """Ask the method."""
        return self.method.ranks()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model hold the averages inside the block."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters()}
        self._put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters():
                    parameter.copy_(trained[name])

    @torch.no_grad()
    def _put_in(self) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(self.averages[name])

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if name in self.averages]
