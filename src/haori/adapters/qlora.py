"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA over a base held in 4 bits (NF4), or in 8 (LLM.int8).

    y = dequantise(Q(W)) x + s B A x

The base is quantised while it is loaded; A and B are as in LoRA, and the adapter is an ordinary one of the base itself.
Over that its answers differ by about as much as the quantised base's do, and the proof says by how much. Merging adds
s B A to W, never to Q(W), whose grid would round it away.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.adapters.behaviour import Behaviour
from haori.adapters.insertion import Insertion, insert_config
from haori.adapters.loftq import LoftqBehaviour, start_from_error
from haori.adapters.lora_starts import check_rank
from haori.adapters.low_rank import LowRankBehaviour, check_low_rank, low_rank_config
from haori.core.errors import InputError
from haori.core.methods import QloraMethod
from haori.core.quantization import Quantization, require_bitsandbytes

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["base_bytes", "behaviour", "check", "check_plan", "insert"]

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def check(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: QloraMethod, targets: Sequence[str]
) -> None:
    """Check names and start against a base; see `check_method`.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        InputError: A module to train in full would be quantised, or LoftQ is asked for where it is not defined.
    """
    from transformers.pytorch_utils import Conv1D

    require_bitsandbytes()
    check_low_rank(model, tokenizer, method, targets)
    quantised = set(_quantised(model))
    for saved in method.modules_to_save:
        if any(name == saved or name.endswith(f".{saved}") for name in quantised):
            raise InputError(
                f"The module {saved!r} is held in {method.bits} bits by qlora and cannot be trained in full; take it "
                "out of method.modules_to_save, or use method.kind=lora."
            )
    if method.init != "loftq":
        return
    if method.bits != 4:
        raise InputError(
            "The start 'loftq' makes up for 4-bit quantisation; set method.bits to 4 or leave method.init."
        )
    for name in targets:
        if name not in quantised or isinstance(model.get_submodule(name), Conv1D):
            raise InputError(
                f"The start 'loftq' is not defined for {name!r}, a {type(model.get_submodule(name)).__name__}; take it "
                "out of method.target, or leave method.init at 'default'."
            )


def check_plan(model: "PreTrainedModel", method: QloraMethod, targets: Sequence[str], steps: int) -> None:
    """Check what depends on the resolved rank; see `check_plan` of methods."""
    check_rank(model, method, targets)


def insert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: QloraMethod,
    targets: Sequence[str],
    insertion: Insertion,
) -> "PeftModel":
    """Insert fresh adapters over the quantised layers; see `insert_method`."""
    config = low_rank_config(model, tokenizer, method, targets, insertion.task_type)
    peft_model = insert_config(model, config, insertion.seed)
    if method.init == "loftq":
        start_from_error(peft_model)
    return peft_model


def behaviour(model: "nn.Module", method: QloraMethod, steps: int) -> Behaviour:
    """Return LoRA+'s groups and, for LoftQ, the conversion at the end."""
    if method.init == "loftq":
        return LoftqBehaviour(model, method.lr_ratio)
    return LowRankBehaviour(model, method.lr_ratio)


def base_bytes(model: "PreTrainedModel", method: QloraMethod, dtype: str) -> tuple[int, int, str]:
    """Return the bytes of a base's weights in `dtype` and quantised, and what the quantisation is called.

    Args:
        model: The base, which may be a skeleton without weights.
        method: The recipe's section.
        dtype: `fp32`, `bf16` or `fp16`: of the whole base, or of what is not quantised.
    """
    quantization = Quantization(method.bits, method.double_quantization)
    before = sum(parameter.numel() for parameter in model.parameters()) * _ELEMENT_BYTES[dtype]
    after = before
    for name in _quantised(model):
        weight = model.get_submodule(name).weight
        outputs, inputs = weight.shape  # of Conv1D the other way round, which matters to 8-bit scales alone
        after -= weight.numel() * _ELEMENT_BYTES[dtype] - quantization.linear_bytes(outputs, inputs)
    return before, after, quantization.label


def _quantised(model: "PreTrainedModel") -> list[str]:
    """Return the modules that transformers quantises: linear ones, without the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and (type(module) is nn.Linear or isinstance(module, Conv1D))
    ]
