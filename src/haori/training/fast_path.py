"""Which path a model's adapters run on while it trains: fused where they can, stock PEFT where not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from haori.core.events import EventSink, Said, discard

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fast_path"]


@contextmanager
def fast_path(model: "nn.Module", *, mixed: bool, on_event: EventSink = discard) -> Iterator[None]:
    """Let `model` run fused inside the block, and say in one line what does and what does not.

    Args:
        model: The model, with adapters or without.
        mixed: Whether autocast is on. Layers that stay on the stock path then leave the dtype of an adapter's input
            to autocast; PEFT would cast it to fp32, which is slower.
        on_event: Receives the line.
    """
    from peft import PeftModel
    from peft.helpers import disable_input_dtype_casting
    from peft.tuners.tuners_utils import BaseTunerLayer

    from haori.adapters.fused import fuse

    if not isinstance(model, PeftModel):
        yield
        return
    fused = fuse(model)
    on_event(Said(text=fused.report.sentence()))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    switchable = all(hasattr(layer, "cast_input_dtype_enabled") for layer in layers)  # not in IA3 and others
    try:
        with disable_input_dtype_casting(model, active=mixed and switchable):
            yield
    finally:
        fused.remove()
