"""A LoRA from the difference of two checkpoints: what a full fine-tune did to each weight, at low rank.

Both are read tensor by tensor, so memory stays near the largest weight in float64. Of every matrix and convolution
that differs the nearest change of the rank is taken (Eckart and Young 1936), exactly and not by random projection.
Biases, norms and embeddings that differ have no place in a LoRA: they are counted and named.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from haori.core.errors import BaseError, MismatchError
from haori.core.records import MODEL_COMPONENT
from haori.library.checkpoints.tensors import BaseTensors
from haori.library.combining.energy import Energy, ModuleEnergy
from haori.library.combining.factors import Factors, low_rank
from haori.library.fit import BaseWeight
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base

__all__ = ["Extracted", "extract_updates"]

_TABLES = re.compile(
    r"(^|[._])(embed_tokens|wte|wpe|word_embeddings|position_embeddings|token_type_embeddings|embed_in|shared|"
    r"token_embedding|position_embedding|tok_embeddings|relative_attention_bias)$"
)


@dataclass(frozen=True)
class Extracted:
    """The difference of two checkpoints.

    Attributes:
        updates: A LoRA of every module that differs.
        energy: What the rank keeps of each.
        left_out: Tensors that differ and that no LoRA represents, by name.
        same: How many tensors are equal.
    """

    updates: AdapterUpdates
    energy: Energy
    left_out: tuple[str, ...] = field(default=())
    same: int = 0

    def sentence(self) -> str:
        """Say what was left out, in words; nothing if everything that differs is in the adapter."""
        if not self.left_out:
            return ""
        names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        return (
            f"Left out: {len(self.left_out)} tensors that differ and that a LoRA cannot represent, such as biases, "
            f"norms and embeddings ({names})."
        )


def extract_updates(
    base: "Base", tuned: "Base", rank: int, *, advance: Callable[[int], None] = lambda _: None
) -> Extracted:
    """Take the difference of two checkpoints at low rank.

    Args:
        base: The base.
        tuned: The same model, trained further.
        rank: Most ranks of a module; a module that changed by less has fewer.
        advance: Is called with the number of values compared.

    Raises:
        MismatchError: The two are different architectures, or nothing differs that a LoRA can represent.
        BaseError: A weight is quantised.
    """
    for model in (base, tuned):
        if model.quantization is not None:
            raise BaseError(
                f"{model.name!r} is quantised ({model.quantization}); the difference of two checkpoints is taken of "
                "those in 16 or 32 bits."
            )
    ours, theirs = BaseTensors(base), BaseTensors(tuned)
    names = _names(base)
    modules: dict[str, ModuleUpdate] = {}
    energies: dict[str, ModuleEnergy] = {}
    left_out: list[str] = []
    same = 0
    for component, weights in ours.weights.items():
        others = theirs.weights.get(component, {})
        _check_alike(base, tuned, component, weights, others)
        for name, weight in weights.items():
            other = others[name]
            if weight.tied and other.tied:
                continue
            before, after = ours.read(component, weight), theirs.read(component, other)
            advance(before.numel())
            if _equal(before, after):
                same += 1
                continue
            module = names(component, name)
            if module is None or before.shape != after.shape or before.dim() < 2:
                left_out.append(f"{component}.{name}")
                continue
            difference = (after.double() - before.double()).flatten(1)
            b, a, energies[module] = low_rank(difference, rank)
            modules[module] = Factors(b, a, tuple(before.shape)).update()
    if not modules:
        raise MismatchError(
            f"{base.name!r} and {tuned.name!r} differ in nothing that a LoRA can represent: {same} tensors are equal, "
            f"and {len(left_out)} others are biases, norms or embeddings."
        )
    return Extracted(AdapterUpdates(modules), Energy(energies), tuple(left_out), same)


def _equal(before: "Tensor", after: "Tensor") -> bool:
    if before.shape != after.shape:
        return False
    return torch.equal(before, after) if before.dtype == after.dtype else torch.equal(before.double(), after.double())


def _check_alike(
    base: "Base", tuned: "Base", component: str, weights: Mapping[str, BaseWeight], others: Mapping[str, BaseWeight]
) -> None:
    if not others:
        raise MismatchError(f"{tuned.name!r} has no component {component!r}, which {base.name!r} has.")
    for name in (*weights, *others):
        if name not in others or name not in weights:
            lacking, having = (tuned, base) if name not in others else (base, tuned)
            raise MismatchError(
                f"{lacking.name!r} has no {component}.{name}, which {having.name!r} has: only two checkpoints of one "
                "architecture have a difference."
            )
        mine, its = weights[name].shape, others[name].shape
        is_table = _TABLES.search(name.removesuffix(".weight")) is not None or name.startswith("lm_head.")
        if mine != its and not (is_table and mine is not None and its is not None and mine[1:] == its[1:]):
            raise MismatchError(
                f"{component}.{name} is of shape {mine} in {base.name!r} and {its} in {tuned.name!r}: only two "
                "checkpoints of one architecture have a difference."
            )


def _names(base: "Base") -> Callable[[str, str], str | None]:
    """Return what gives the full module name of a weight that a LoRA can change, and None for any other tensor."""
    if set(base.components) != {MODEL_COMPONENT}:
        return _by_name
    from torch import nn

    from haori.bases.loading import load_skeleton

    model: Any = load_skeleton(base)
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."

    def by_model(component: str, name: str) -> str | None:
        path, _, parameter = name.rpartition(".")
        found = next((p for p in (path, prefix + path, path.removeprefix(prefix)) if p in modules), None)
        if found is None or parameter != "weight" or isinstance(modules[found], nn.Embedding):
            return None
        return f"{component}.{found}" if modules[found].weight.dim() >= 2 else None

    return by_model


def _by_name(component: str, name: str) -> str | None:
    path, _, parameter = name.rpartition(".")
    is_norm = re.search(r"norm\d*$|layer_norm\d*$|(^|\.)ln_\w+$", path) is not None
    if parameter != "weight" or is_norm or _TABLES.search(path):
        return None
    return f"{component}.{path}"
