"""Text generation: conversations or plain text, loss on the tokens that the model should write."""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.tasks.causal_lm.recipe import RECIPE
    from haori.tasks.causal_lm.task import TASK

__all__ = ["RECIPE", "TASK"]

__getattr__ = lazy_exports(__name__, {"recipe": ("RECIPE",), "task": ("TASK",)})
