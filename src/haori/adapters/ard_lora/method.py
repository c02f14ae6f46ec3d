"""ARD-LoRA as a method of a recipe: what is checked before weights are loaded, and what is inserted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.adapters.ard_lora.config import ArdLoraConfig
from haori.adapters.ard_lora.tuner import require_adaptable
from haori.adapters.insertion import Insertion, check_named, insert_config, saved_modules, trained_rows
from haori.core.errors import InputError
from haori.core.methods import ArdLoraMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check", "insert"]


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: ArdLoraMethod, targets: Sequence[str]
) -> None:
    """Check a method against a base; see `check_method`."""
    check_named(model, tokenizer, method, targets)
    if method.warmup + method.settle >= 1:
        raise InputError(
            f"'method.warmup' ({method.warmup:g}) and 'method.settle' ({method.settle:g}) leave ARD-LoRA no steps in "
            "which ranks are learnt; together they must be less than 1."
        )
    for name in targets:
        require_adaptable(name, model.get_submodule(name))


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: ArdLoraMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze `model` and insert fresh adapters; see `insert_method`."""
    if method.rank == "auto" or method.alpha == "auto":
        raise InputError("Rank and alpha must be numbers here; `haori train` chooses them when they are 'auto'.")
    config = ArdLoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=0.0 if method.dropout == "auto" else method.dropout,
        per_head=method.per_head,
        target_modules=list(targets),
        modules_to_save=saved_modules(model, method),
        trainable_token_indices=trained_rows(model, tokenizer, method.trainable_tokens),
        task_type=insertion.task_type,
    )
    return insert_config(model, config, insertion.seed)
