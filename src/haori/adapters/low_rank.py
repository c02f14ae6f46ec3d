"""What the methods of the form y = W x + s B A x share: PEFT's LoraConfig, its checks, LoRA+'s learning rates."""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import check_named, saved_modules, trained_rows
from haori.adapters.patterns import exact_patterns, refuse_clash
from haori.core.errors import InputError
from haori.core.methods import LowRankMethod

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LowRankBehaviour", "check_low_rank", "low_rank_config"]

_BIAS = {"none": "none", "adapted": "lora_only", "all": "all"}
_OUTER = ("lora_B", "lora_embedding_B")


class LowRankBehaviour(Behaviour):
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `lr_ratio` times as fast as everything else.

    Args:
        model: The model with the adapters in it.
        lr_ratio: Learning rate of B divided by that of A.
    """

    def __init__(self, model: "torch.nn.Module", lr_ratio: float) -> None:
        super().__init__(model)
        self.lr_ratio = lr_ratio

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return one group, or two with `rate` 1 and `lr_ratio`."""
        if self.lr_ratio == 1.0:
            return super().parameter_groups(weight_decay)
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": weight_decay, "rate": rate} for rate in (1.0, self.lr_ratio)
        ]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[any(part in _OUTER for part in name.split("."))]["params"].append(parameter)
        return groups


def check_low_rank(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: LowRankMethod, targets: Sequence[str]
) -> None:
    """Check names, patterns and biases against a base, which may be a skeleton without weights.

    Raises:
        InputError: A name is not in the base, a pattern fits no target, two patterns give a target different values,
            or there are no biases to train.
    """
    check_named(model, tokenizer, method, targets)
    for field, pattern in (("rank_pattern", method.rank_pattern), ("alpha_pattern", method.alpha_pattern)):
        for key in pattern:
            _check_pattern(field, key, targets)
        refuse_clash(field, pattern, targets)
    if method.bias != "none":
        wanted = set(targets)
        biases = [
            name
            for name, module in model.named_modules()
            if getattr(module, "bias", None) is not None and (method.bias == "all" or name in wanted)
        ]
        if not biases:
            where = "" if method.bias == "all" else " in the adapted modules"
            raise InputError(f"The base has no biases{where} to train; leave method.bias at 'none'.")


def low_rank_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: LowRankMethod,
    targets: Sequence[str],
    task_type: str | None,
    **options: Any,
) -> "LoraConfig":
    """Build PEFT's configuration from a resolved method.

    Args:
        model: The base.
        tokenizer: Its tokenizer.
        method: The method with rank and alpha resolved to numbers.
        targets: Full names of the modules to adapt.
        task_type: What PEFT calls the task.
        options: Further fields of the configuration.

    Raises:
        InputError: Rank or alpha is still `auto`.
    """
    from peft import LoraConfig

    if method.rank == "auto" or method.alpha == "auto":
        raise InputError("Rank and alpha must be numbers here; `haori train` chooses them when they are 'auto'.")
    with warnings.catch_warnings():
        # PEFT's own conversion of PiSSA and OLoRA does not go with patterns and rsLoRA; ours does.
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")
        return LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=0.0 if method.dropout == "auto" else method.dropout,
            use_rslora=method.rslora,
            # By full names: PEFT's file sorts the keys, and the first that fits counts.
            rank_pattern=exact_patterns(method.rank_pattern, targets),
            alpha_pattern=exact_patterns(method.alpha_pattern, targets),
            target_modules=list(targets),
            modules_to_save=saved_modules(model, method),
            trainable_token_indices=trained_rows(model, tokenizer, method.trainable_tokens),
            bias=_BIAS[method.bias],
            task_type=task_type,
            **options,
        )


def _check_pattern(key: str, pattern: str, targets: Sequence[str]) -> None:
    from peft.utils.other import get_pattern_key

    try:
        # PEFT returns the module's own name where no pattern fits.
        fits = any(get_pattern_key([pattern], name) == pattern for name in targets)
    except re.error as error:
        raise InputError(f"The key {pattern!r} of method.{key} is not a valid regular expression: {error}.") from None
    if not fits:
        raise InputError(
            f"The key {pattern!r} of method.{key} fits none of the {len(targets)} target modules; give the end of a "
            f"module's name, such as {targets[0].rpartition('.')[2]!r}."
        )
