"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: y = W x + s B A x.

s = alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). A starts random
(Kaiming), B at zero, so that training begins exactly at the base. Knows nothing about data or training.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.core.errors import InputError, nearest
from haori.core.recipe import LoraMethod

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_lora", "insert_lora", "lora_config"]


def lora_config(method: LoraMethod, targets: Sequence[str], token_ids: Sequence[int] = ()) -> "LoraConfig":
    """Build PEFT's configuration from a resolved method.

    Args:
        method: The method with rank and alpha resolved to numbers.
        targets: Full names of the modules to adapt.
        token_ids: Ids of the tokens whose embeddings are trained.

    Raises:
        InputError: Rank or alpha is still `auto`.
    """
    from peft import LoraConfig

    if method.rank == "auto" or method.alpha == "auto":
        raise InputError("Rank and alpha must be numbers here; `haori train` chooses them when they are 'auto'.")
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        target_modules=list(targets),
        modules_to_save=list(method.modules_to_save) or None,
        trainable_token_indices=list(token_ids) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def check_lora(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: LoraMethod) -> None:
    """Check what a method names against a base; the model may be a skeleton without weights.

    Raises:
        InputError: A trainable token is not a single token of the base, or a module to save does not exist.
    """
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in method.modules_to_save:
        if name not in leaves:
            known = sorted(leaf for leaf in leaves if not leaf.isdigit())
            hint = nearest(name, known) or f"it has {', '.join(known)}."
            raise InputError(f"The base has no module {name!r} to train in full; {hint}")
    _token_ids(tokenizer, method.trainable_tokens)


def insert_lora(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    method: LoraMethod,
    targets: Sequence[str],
    *,
    seed: int,
) -> "PeftModel":
    """Freeze `model` and insert fresh adapters, in fp32 whatever the base's dtype."""
    import torch
    from peft import PeftModel, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
        peft_model = get_peft_model(model, lora_config(method, targets, _token_ids(tokenizer, method.trainable_tokens)))
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _token_ids(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[int]:
    ids = []
    for token in tokens:
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise InputError(
                f"The trainable token {token!r} is {len(found)} tokens in this base; give text that is exactly one."
            )
        ids.append(int(found[0]))
    return ids
