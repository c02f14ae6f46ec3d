"""Full fine-tuning: every weight of the base is trained; what every adapter is compared with.

In mixed precision the weights are fp32 masters and only the products are computed in 16 bits. Weights that are
themselves bf16 take half the memory, with AdamW's moments too, but have 8 significant bits: a step smaller than about
1/256 of a weight is lost to rounding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion
from haori.core.methods import FullMethod

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["behaviour", "check", "insert"]


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: FullMethod, targets: Sequence[str]
) -> None:
    """Accept every base: one that is stored quantised is refused before its structure is looked at."""


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: FullMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PreTrainedModel":
    """Make every weight trainable; see `insert_method`."""
    model.requires_grad_(True)
    return model


def behaviour(model: "nn.Module", method: FullMethod, steps: int) -> Behaviour:
    """Return what full fine-tuning adds to a step, which is nothing; see `behaviour_of`."""
    return Behaviour(model)
