"""Teaching text-to-image pipelines a style, a subject or a concept from pictures."""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.tasks.text_to_image.recipe import RECIPE
    from haori.tasks.text_to_image.task import TASK

__all__ = ["RECIPE", "TASK"]

__getattr__ = lazy_exports(__name__, {"recipe": ("RECIPE",), "task": ("TASK",)})
