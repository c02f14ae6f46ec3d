"""The head of a classifier alone: the base stays as it is, and nothing is inserted into it.

In PEFT this is a LoRA configuration that adapts no module (PEFT's placeholder stands for the targets) and keeps the
head whole, so that stock PEFT loads it like any adapter. Which modules are the head is the task's to say.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, check_saved, insert_config
from haori.core.methods import HeadMethod

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["behaviour", "check", "insert"]


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: HeadMethod, targets: Sequence[str]
) -> None:
    """Check that the modules it names exist; see `check_method`."""
    check_saved(model, method.modules_to_save)


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: HeadMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Freeze all but the head; see `insert_method`."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES

    config = LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=list(method.modules_to_save),
        task_type=insertion.task_type,
    )
    return insert_config(model, config, insertion.seed)


def behaviour(model: "nn.Module", method: HeadMethod, steps: int) -> Behaviour:
    """Return the default: a head adds nothing to a step."""
    return Behaviour(model)
