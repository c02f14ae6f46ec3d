"""Names the modules of a base that an adapter can attach to, and resolves what a recipe asks for.

Knows nothing of any architecture: linear modules are found by class, attention by the names of the modules around
them. Names match by suffix as in PEFT (`q_proj` is every module whose name ends in `.q_proj`).
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from haori.bases.heads import head_modules
from haori.core.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["linear_modules", "resolve_targets"]

_PLAIN = re.compile(r"[\w.-]+")
# PEFT refuses `out_proj` and `conv1d` of these; `dt_proj` it would wrap, though only its weight is ever looked at.
_READ_BY_KERNELS = {
    "falcon_h1": ("out_proj", "conv1d"),
    "falcon_mamba": ("out_proj", "conv1d", "dt_proj"),
    "jamba": ("dt_proj",),
    "mamba": ("out_proj", "conv1d", "dt_proj"),
    "mamba2": ("out_proj", "conv1d"),
    "nemotron_h": ("out_proj", "conv1d"),
}
# Quantised linears that do not derive from nn.Linear.
_QUANTISED = ("QuantLinear", "WQLinear", "AqlmQuantizedLinear", "HQQLinear", "EetqLinear", "FPQuantLinear")


def linear_modules(model: "nn.Module") -> list[str]:
    """Return the full names of the linear modules except the head, in the model's order.

    The head is what computes the logits of tokens, or all that a classifier has behind its last hidden states.
    `Conv1D` of GPT-2 and quantised linears count as linear. Those of Mamba whose weights its kernels read, past any
    adapter, do not.
    """
    head, classifier = _output_head(model), tuple(f"{name}." for name in head_modules(model))
    return [
        name for name, module in model.named_modules()
        if module is not head and not f"{name}.".startswith(classifier or ("?",))
        and _is_linear(module) and not _is_read_by_kernel(model, name)
    ]  # fmt: skip


def resolve_targets(model: "nn.Module", target: str | Iterable[str]) -> list[str]:
    """Return the full module names that `target` stands for, in the model's order.

    Args:
        model: The base model, without an adapter.
        target: `all-linear`, `attention`, a module name (matched by suffix) or a regular expression (matched against
            the whole name), or several of them. A model of several components says itself what further words mean,
            such as `text_encoder` and `convolutions`.

    Raises:
        InputError: Something in `target` matches no module an adapter can attach to.
    """
    wanted = [target] if isinstance(target, str) else list(target)
    if not wanted:
        raise InputError("The target is empty; name at least one module, or use 'all-linear'.")
    chosen: set[str] = set()
    for item in wanted:
        chosen.update(_resolve_one(model, item))
    return [name for name, _ in model.named_modules() if name in chosen]


def _resolve_one(model: "nn.Module", item: str) -> list[str]:
    linears = linear_modules(model)
    named: Any = getattr(model, "module_groups", dict)
    groups: dict[str, list[str]] = named()
    if item in groups:
        found = groups[item]
        linears = groups["all-linear"]
    elif item == "all-linear":
        found = linears
    elif item == "attention":
        found = [name for name in linears if re.search(r"attn|attention", name.rpartition(".")[0], re.IGNORECASE)]
    else:
        return _match(model, item, linears)
    if not found:
        raise InputError(f"The base has no modules for {item!r}. {_list(linears)}")
    return found


def _match(model: "nn.Module", item: str, linears: list[str]) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    if _PLAIN.fullmatch(item):
        found = [name for name in modules if name == item or name.endswith(f".{item}")]
    else:
        try:
            pattern = re.compile(item)
        except re.error as error:
            raise InputError(f"The target {item!r} is not a valid regular expression: {error}.") from None
        found = [name for name in modules if pattern.fullmatch(name)]
    usable = [
        name for name in found
        if name in set(linears) or (_is_adaptable(modules[name]) and not _is_read_by_kernel(model, name))
    ]  # fmt: skip
    if usable:
        return usable
    if found:
        kind = type(modules[found[0]]).__name__
        if _is_read_by_kernel(model, found[0]):
            raise InputError(
                f"The target {item!r} names {found[0]!r}, whose weights the kernels of Mamba read, past any adapter; "
                f"name other modules. {_list(linears)}"
            )
        raise InputError(
            f"The target {item!r} names a {kind}, which an adapter cannot attach to; name modules inside it. "
            f"{_list(linears)}"
        )
    suffixes = [name.rpartition(".")[2] for name in modules if name in set(linears)]
    hint = nearest(item, dict.fromkeys(suffixes)) or "no name comes close."
    raise InputError(f"The base has no module {item!r}; {hint} {_list(linears)}")


def _list(linears: list[str]) -> str:
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    return f"Its linear modules are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."


def _output_head(model: "nn.Module") -> "nn.Module | None":
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except NotImplementedError:
        return None
    return head


def _is_read_by_kernel(model: "nn.Module", name: str) -> bool:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return name.rpartition(".")[2] in _READ_BY_KERNELS.get(str(kind), ())


def _is_linear(module: "nn.Module") -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith(_QUANTISED)


def _is_adaptable(module: "nn.Module") -> bool:
    """Say whether PEFT's LoRA can wrap this module when it is named explicitly."""
    from torch import nn

    return _is_linear(module) or isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
