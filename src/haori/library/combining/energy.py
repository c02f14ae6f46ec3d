"""How much of each module's change a truncation kept.

The energy of a change is its squared Frobenius norm, which is the sum of its squared singular values; a truncation to
rank R keeps the R largest (Eckart and Young 1936), and the share it keeps says how near the result is:
|dW - dW'|^2 = (1 - share) |dW|^2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

__all__ = ["Energy", "ModuleEnergy"]


class ModuleEnergy(NamedTuple):
    """Squared Frobenius norms of one module's change: what was kept, and what there was."""

    kept: float
    total: float

    @property
    def share(self) -> float:
        """Return what was kept as a share; 1 where there was nothing to keep."""
        return self.kept / self.total if self.total > 0 else 1.0


@dataclass(frozen=True)
class Energy:
    """The energies of all modules that were truncated; those left exact are not among them."""

    modules: Mapping[str, ModuleEnergy]

    @property
    def share(self) -> float:
        """Return the share kept in all."""
        kept = sum(module.kept for module in self.modules.values())
        return ModuleEnergy(kept, sum(module.total for module in self.modules.values())).share

    @property
    def median(self) -> float:
        """Return the median share over modules."""
        return median(module.share for module in self.modules.values()) if self.modules else 1.0

    @property
    def worst(self) -> tuple[str, float]:
        """Return the module of which the smallest share was kept, with that share; an empty name if there is none."""
        if not self.modules:
            return "", 1.0
        name = min(self.modules, key=lambda module: self.modules[module].share)
        return name, self.modules[name].share

    def sentence(self) -> str:
        """Say it in words."""
        if not self.modules:
            return "Nothing was truncated: the result is exact."
        name, least = self.worst
        return (
            f"Energy kept: {self.share:.2%} in all, median {self.median:.2%} over {len(self.modules)} modules, "
            f"least {least:.2%} in {name}."
        )
