"""What a method adds to a training step besides its parameters.

The loop calls these at fixed places and knows no method by name. The default is plain LoRA: one parameter group, no
penalty, nothing to do after a step, no state of its own.
"""

from typing import Any

import torch

__all__ = ["Behaviour"]


class Behaviour:
    """The default behaviour; a method overrides what it needs.

    Args:
        model: The model with the method's parameters in it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return AdamW's groups; `rate` is the factor on the schedule's learning rate.

        A group with `lr_peak` has a peak of its own instead, on the same schedule.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{"params": parameters, "weight_decay": weight_decay, "rate": 1.0}]

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the loss of an optimizer step (its graph included), or None."""
        return None

    def settled(self, step: int) -> bool:
        """Say whether the model after `step` is of the kind that was asked for, ranks included.

        A validation before that is neither the best nor a reason to stop early.
        """
        return True

    def after_step(self, step: int) -> None:
        """Act after optimizer step `step` (from 1); the gradients are still there."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint must hold besides parameters and optimizer for an exact resume."""
        return {}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""

    def finish(self) -> None:
        """Bring the trained model into the form in which it is saved, such as pruned ranks."""

    def ranks(self) -> dict[str, int | list[int]]:
        """Return the final rank of each module, or of each of its heads, where the method learnt them."""
        return {}
