"""The fused training path: the same adapters, computed with fewer and larger operations.

See install.py for what is replaced, factors.py for what a layer must be like, and docs/log.md for what was measured.
"""

from haori.adapters.fused.install import Fused, FusedReport, fuse, runs_as_a_whole, stock_forward
from haori.adapters.fused.loss_forward import forms_its_loss, forward_arguments

__all__ = ["Fused", "FusedReport", "forms_its_loss", "forward_arguments", "fuse", "runs_as_a_whole", "stock_forward"]
