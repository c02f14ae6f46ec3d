"""The two systems compared: the model with its adapter, and its base.

The base is the same model with the adapter switched off, so both share every other weight and nothing is
loaded twice. Where an adapter has changed weights of the base itself, switching it off would not give the base back:
that is refused, unless the base is given as a model of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from haori.core.errors import MismatchError

__all__ = ["Pair", "Systems"]

T = TypeVar("T")
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class Pair(NamedTuple, Generic[T]):
    """The same thing from both systems; `base` is None when the base is not compared."""

    adapter: T
    base: T | None


class Systems:
    """An adapter over its base, and how to run work on each.

    Args:
        model: The PeftModel.
        against_base: Whether the base is measured too.
        base_model: The base on its own; None uses `model` with the adapter off.

    Raises:
        MismatchError: The adapter cannot be switched off and no `base_model` was given.
    """

    def __init__(self, model: Any, *, against_base: bool, base_model: nn.Module | None = None) -> None:
        self.model = model
        self.base_model = base_model
        self.against_base = against_base
        if against_base and base_model is None:
            self._check_switchable()

    def on_both(self, work: Callable[[nn.Module, str], T]) -> Pair[T]:
        """Call `work(model, "adapter")` and, when the base is compared, `work(base, "base")`."""
        with _evaluating(self.model):
            found = work(self.model, "adapter")
        if not self.against_base:
            return Pair(found, None)
        if self.base_model is not None:
            with _evaluating(self.base_model):
                return Pair(found, work(self.base_model, "base"))
        with _evaluating(self.model), self.model.disable_adapter():
            return Pair(found, work(self.model, "base"))

    def _check_switchable(self) -> None:
        if not hasattr(self.model, "disable_adapter"):
            raise MismatchError(
                f"A model of class {type(self.model).__name__} has no adapter to switch off; give a "
                "PeftModel, or the base as base_model, or against_base=False."
            )
        config = self.model.peft_config[self.model.active_adapter]
        changes = []
        if getattr(config, "bias", "none") not in (None, "none"):
            changes.append(f"bias={config.bias!r} trains the base's own biases")
        if getattr(config, "layer_replication", None):
            changes.append("layer_replication adds layers to the base")
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
            changes.append(f"init_lora_weights={init!r} moves a part of the base's weights into the adapter")
        if changes:
            raise MismatchError(
                f"Switching this adapter off does not give its base back ({'; '.join(changes)}): pass the "
                "base loaded on its own as base_model, or against_base=False."
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put modes and gradient flags back afterwards: PEFT changes the flags."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, needs_gradient in flags.items():
            parameter.requires_grad_(needs_gradient)
