"""Preference learning: DPO, IPO, hinge, ORPO, SimPO and KTO over answers that people prefer to others."""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.tasks.preference.recipe import RECIPE
    from haori.tasks.preference.task import TASK

__all__ = ["RECIPE", "TASK"]

__getattr__ = lazy_exports(__name__, {"recipe": ("RECIPE",), "task": ("TASK",)})
