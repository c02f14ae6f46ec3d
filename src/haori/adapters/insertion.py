"""What the methods share: names checked against a base, a PEFT configuration inserted, dead starts refused."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import InputError, nearest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from haori.core.methods import AdaptedMethod

__all__ = [
    "Insertion",
    "check_named",
    "check_saved",
    "expert_parameters",
    "in_layers",
    "insert_config",
    "norm_modules",
    "refuse_dead",
    "saved_modules",
    "token_ids",
    "trained_rows",
]


class Insertion(NamedTuple):
    """What an insertion may draw on.

    Attributes:
        seed: Of the initialisation.
        steps: Planned optimizer steps.
        batches: Arguments of the forward for training rows, for starts computed from data; may be iterated
            more than once.
        task_type: What PEFT calls the task, such as SEQ_CLS.
    """

    seed: int
    steps: int
    batches: "Iterable[Mapping[str, Tensor]]" = ()
    task_type: str | None = None


def check_named(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", method: "AdaptedMethod", targets: Sequence[str]
) -> None:
    """Check what a method names besides its targets.

    Raises:
        InputError: A trainable token is not a single token of the base, a module to save does not exist, or there are
            no normalisation layers to train.
    """
    check_saved(model, method.modules_to_save)
    if method.train_norms and not norm_modules(model, method):
        raise InputError("The base has no normalisation layers to train; leave method.train_norms at false.")
    token_ids(tokenizer, method.trainable_tokens)


def check_saved(model: "nn.Module", names: Sequence[str]) -> None:
    """Check that there are modules of these names, given in full or by their last part.

    Raises:
        InputError: There is none.
    """
    full = {name for name, _ in model.named_modules() if name}
    leaves = {name.rpartition(".")[2] for name in full}
    for name in names:
        if name not in full | leaves:
            known = sorted(leaf for leaf in leaves if not leaf.isdigit())
            hint = nearest(name, known) or f"it has {', '.join(known)}."
            raise InputError(f"The base has no module {name!r} to train in full; {hint}")


def norm_modules(model: "PreTrainedModel", method: "AdaptedMethod") -> list[str]:
    """Return the full names of the normalisation layers (classes that end in Norm), within `method.layers` if given.

    A norm that belongs to no numbered layer, such as the last one, is trained only where no layers are given.
    """
    names = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    return [name for name in names if not method.layers or _layer_of(name) in method.layers]


def saved_modules(model: "PreTrainedModel", method: "AdaptedMethod") -> list[str] | None:
    """Return what PEFT calls modules_to_save.

    PEFT compares by ending, and `norm` is also the ending of `input_layernorm`; full names mean one module each.
    """
    norms = norm_modules(model, method) if method.train_norms else []
    words: Any = getattr(model, "word_modules", list)()  # rows of new words of a model for pictures
    return [*method.modules_to_save, *norms, *words] or None


def expert_parameters(model: "nn.Module") -> dict[str, int]:
    """Return the parameters that hold all experts of a layer, [experts, ., .], with their numbers of values.

    transformers keeps the experts of most mixtures so. They are no linear modules, and no target names them.
    """
    from torch.nn.modules.conv import _ConvNd

    return {
        f"{name}.{key}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def in_layers(targets: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    """Return the targets that belong to the transformer layers of these numbers; to any where none are given.

    Raises:
        InputError: A layer holds no target.
    """
    if not layers:
        return tuple(targets)
    known = sorted({number for name in targets if (number := _layer_of(name)) is not None})
    for layer in layers:
        if layer not in known:
            has = (
                f"targets are in the layers {known[0]} to {known[-1]}" if known else "no target is in a numbered layer"
            )
            raise InputError(f"'method.layers' names the layer {layer}, which holds no target; {has}.")
    return tuple(name for name in targets if _layer_of(name) in layers)


def insert_config(model: "PreTrainedModel", config: "PeftConfig", seed: int) -> "PeftModel":
    """Freeze `model` and insert what `config` describes, in fp32 whatever the base's dtype."""
    import torch
    from peft import PeftModel, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is checked here, or proved at the end
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def refuse_dead(model: "nn.Module") -> None:
    """Refuse a start in which A and B of a module are both zero: dL/dB = s g (Ax)^T and dL/dA = s B^T g x^T are zero.

    Raises:
        InputError: There is such a module; it would never learn.
    """
    for name, module in model.named_modules():
        for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            pair: list[Any] = [getattr(module, part, {}) for part in (first, second)]
            for adapter in pair[0]:
                if adapter in pair[1] and not any(_weight(part[adapter]).any() for part in pair):
                    raise InputError(
                        f"In {name.removeprefix('base_model.model.')!r} both A and B begin at zero, so both their "
                        "gradients are zero for ever and nothing would be learnt; choose a start with one of them "
                        "random."
                    )


def trained_rows(
    model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]
) -> list[int] | dict[str, list[int]] | None:
    """Return what PEFT calls trainable_token_indices: rows of the embedding, or by the names of several embeddings.

    A model with several text encoders says which embeddings it has (`token_embeddings`); a token is trained in each of
    those whose tokenizer gives it the same id, as the two of Stable Diffusion XL do.

    Raises:
        InputError: A text is not exactly one token of the base.
    """
    ids = token_ids(tokenizer, tokens)
    embeddings: Any = getattr(model, "token_embeddings", dict)()
    readers: Any = getattr(tokenizer, "tokenizers", {})
    alike = {
        name: list(ids)
        for reader, name in embeddings.items()
        if [readers[reader](token, add_special_tokens=False)["input_ids"] for token in tokens] == [[one] for one in ids]
    }
    return (alike or ids) if ids else None


def token_ids(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[int]:
    """Return the ids of tokens given as text.

    Raises:
        InputError: A text is not exactly one token of the base.
    """
    ids = []
    for token in tokens:
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise InputError(
                f"The trainable token {token!r} is {len(found)} tokens in this base; give text that is exactly one."
            )
        ids.append(int(found[0]))
    return ids


def _layer_of(name: str) -> int | None:
    """Return the first number in a module's name: `model.layers.3.mlp.up_proj` belongs to layer 3."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _weight(part: Any) -> "Tensor":
    found: Tensor = getattr(part, "weight", part)
    return found
