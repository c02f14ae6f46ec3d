"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: y = W x + s B A x.

s = alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). By default A starts random
(Kaiming) and B at zero, so that training begins exactly at the base; `lora_starts` holds the other starts. Knows
nothing about data or training.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, insert_config
from haori.adapters.lora_starts import (
    RESIDUAL_STARTS,
    ResidualBehaviour,
    check_rank,
    check_start,
    eva_options,
    eva_tokens,
    start_from_inputs,
)
from haori.adapters.low_rank import LowRankBehaviour, check_low_rank, low_rank_config
from haori.core.methods import LoraMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["behaviour", "check", "check_plan", "insert"]


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: LoraMethod, targets: Sequence[str]
) -> None:
    """Check names and start against a base; see `check_method`."""
    check_low_rank(model, tokenizer, method, targets)
    check_start(model, method, targets)


def check_plan(model: "PreTrainedModel", method: LoraMethod, targets: Sequence[str], steps: int) -> None:
    """Check what depends on the resolved rank; see `check_plan` of methods."""
    check_rank(model, method, targets)


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: LoraMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze `model` and insert fresh adapters; see `insert_method`."""
    options: dict[str, Any] = {} if method.init == "default" else {"init_lora_weights": method.init}
    if method.init == "eva":
        options |= eva_options(method)
    config = low_rank_config(model, tokenizer, method, targets, insertion.task_type, **options)
    peft_model = insert_config(model, config, insertion.seed)
    if method.init == "eva":
        start_from_inputs(peft_model, insertion.batches, eva_tokens(method))
    return peft_model


def behaviour(model: "nn.Module", method: LoraMethod, steps: int) -> Behaviour:
    """Return LoRA+'s groups and, for a start taken from the base's weights, the conversion at the end."""
    if method.init in RESIDUAL_STARTS:
        return ResidualBehaviour(model, method.lr_ratio)
    return LowRankBehaviour(model, method.lr_ratio)
