"""Configurations of other training tools, converted into recipes; each tool is a table of its keys.

Knows the file of the other tool and the recipe, and nothing of bases, data or training. Importing this package is
light: the names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.conversion.convert import Conversion, import_config
    from haori.conversion.report import commented_recipe, report_lines
    from haori.conversion.tools import TOOLS

__all__ = ["TOOLS", "Conversion", "commented_recipe", "import_config", "report_lines"]

__getattr__ = lazy_exports(
    __name__,
    {
        "convert": ("Conversion", "import_config"),
        "report": ("commented_recipe", "report_lines"),
        "tools": ("TOOLS",),
    },
)
