"""DoRA (Liu et al. 2024, arXiv 2402.09353) through PEFT: W' = m (W + s B A) / ||W + s B A||, norms per output row.

m starts at ||W||, so that training begins exactly at the base; the norm is taken out of the graph, as in the paper.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, insert_config
from haori.adapters.low_rank import LowRankBehaviour, check_low_rank, low_rank_config
from haori.core.methods import DoraMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["behaviour", "check", "insert"]


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: DoraMethod, targets: Sequence[str]
) -> None:
    """Check names against a base; see `check_method`."""
    check_low_rank(model, tokenizer, method, targets)


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: DoraMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze `model` and insert fresh adapters with magnitudes; see `insert_method`."""
    config = low_rank_config(model, tokenizer, method, targets, insertion.task_type, use_dora=True)
    return insert_config(model, config, insertion.seed)


def behaviour(model: "nn.Module", method: DoraMethod, steps: int) -> Behaviour:
    """Return LoRA+'s groups; magnitudes learn at the rate of A."""
    return LowRankBehaviour(model, method.lr_ratio)
