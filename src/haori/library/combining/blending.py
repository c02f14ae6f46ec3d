"""One adapter that changes each weight by sum_i w_i dW_i, or by what TIES, DARE or KnOTS make of the dW_i.

The sum is exact: B_i with their weights and scales stand side by side, and A_i one below another, so the rank is the
sum of the ranks; where the parts have directions in common, or that sum is more than a matrix can have, it is the true
rank, by a lossless singular value decomposition. A module that only one adapter changes counts with the others' zero.

Averaging the A and the B by themselves is another thing: it gives sum_ij w_i w_j B_i A_j, in which weights of 0.4 and
0.6 act as 0.16 and 0.36, beside cross terms that no adapter learnt.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from haori.core.errors import InputError, MismatchError
from haori.library.combining.energy import Energy, ModuleEnergy
from haori.library.combining.factors import Factors, factors_of, numerical_rank, stacked, truncated
from haori.library.combining.weighing import knots, merge_of
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Blend", "BlendOptions", "Part", "blend_updates"]

WeightOf = Callable[[str], "Tensor"]
"""Gives the weight W of a module of the base."""

# The factor by which a whole update is multiplied.
_SCALED = ("B", "w1_a", "w1", "diff")
_NEW_WORDS = "bundle_emb"


class Part(NamedTuple):
    """One adapter of a blend: what it is called, what it changes, and its weight."""

    name: str
    updates: AdapterUpdates
    weight: float


@dataclass(frozen=True)
class BlendOptions:
    """How a blend is made.

    Attributes:
        method: One of `weighing.METHODS`.
        rank: Most ranks of a module; None keeps the sum exact.
        density: Share of values that TIES and DARE keep.
        seed: Seed of what DARE drops.
    """

    method: str = "linear"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: One is.
        """
        merge_of(self.method)
        if not 0 < self.density <= 1:
            raise InputError(
                f"The density is the share of values that stay, above 0 and at most 1, not {self.density:g}."
            )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"The rank of a blend is at least 1, not {self.rank}.")


class Blend(NamedTuple):
    """The blended adapter, and what truncation kept of each module that was truncated."""

    updates: AdapterUpdates
    energy: Energy


def blend_updates(
    parts: Sequence[Part],
    options: BlendOptions,
    *,
    weight_of: WeightOf | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Blend:
    """Blend adapters of one base.

    One adapter at weight 1 is returned as it is, unless a rank is asked for.

    Args:
        parts: The adapters with their weights; a weight of zero takes an adapter out.
        options: How.
        weight_of: Gives a weight of the base, which DoRA needs: its change depends on it.
        advance: Is called with 1 after each module.

    Raises:
        InputError: A weight is not finite, all are zero, or an option is out of range.
        MismatchError: Parts do not add up, or cannot be represented without a rank.
    """
    options.check()
    for part in parts:
        if not math.isfinite(part.weight):
            raise InputError(f"The weight of {part.name!r} is {part.weight}; use a finite number.")
    parts = [part for part in parts if part.weight != 0]
    if not parts:
        raise InputError("All weights are zero, so nothing is left to blend; give one adapter another weight.")
    if len(parts) == 1 and parts[0].weight == 1 and options.rank is None and options.method == "linear":
        return Blend(parts[0].updates, Energy({}))
    extra = _extra(parts)
    modules: dict[str, ModuleUpdate] = {}
    energies: dict[str, ModuleEnergy] = {}
    for name in dict.fromkeys(name for part in parts for name in part.updates.modules):
        own = [(part, part.updates.modules[name]) for part in parts if name in part.updates.modules]
        modules[name], energy = _Module(name, own, options, weight_of, len(parts) == 1).blended()
        if energy is not None:
            energies[name] = energy
        advance(1)
    family = next((part.updates.family for part in parts if part.updates.family is not None), None)
    return Blend(AdapterUpdates(modules, {}, parts[0].updates.format, family, extra), Energy(energies))


class _Module(NamedTuple):
    """What each adapter does to one module."""

    name: str
    own: Sequence[tuple[Part, ModuleUpdate]]
    options: BlendOptions
    weight_of: WeightOf | None
    all_alike: bool

    def blended(self) -> tuple[ModuleUpdate, ModuleEnergy | None]:
        update, energy = self._weight()
        biases = [part.weight * own.bias.double() for part, own in self.own if own.bias is not None]
        bias = torch.stack(biases).sum(dim=0).float() if biases else None
        return replace(update, bias=bias), energy

    def _weight(self) -> tuple[ModuleUpdate, ModuleEnergy | None]:
        options, own = self.options, self.own
        if self._is_vector():
            return self._sum_of_vectors(), None
        exact = options.method == "linear" and options.rank is None
        if exact and len(own) == 1 and self._keeps_kind(own[0][1]):
            return _scaled(own[0][1], own[0][0].weight), None
        factors = [self._factors(part, update) for part, update in own]
        total = self._total(factors)
        if options.rank is not None:
            return _truncated(total, options.rank)
        if options.method in {"ties", "dare", "dare-ties"}:  # of full rank, whatever that of the parts
            return _truncated(total, sum(part.rank for part in factors))
        if exact and any(part.rank >= part.full_rank for part in factors):
            return ModuleUpdate("diff", {"diff": total.product().reshape(total.shape).float()}), None
        rank = numerical_rank(total)
        return (total if rank == total.rank else truncated(total, rank)[0]).update(), None

    def _keeps_kind(self, update: ModuleUpdate) -> bool:
        """Say whether an update that stands alone stays as it is; beside LoRA others become LoRA, for formats' sake."""
        return update.magnitude is None and (self.all_alike or update.kind in {"lora", "diff"})

    def _total(self, factors: Sequence[Factors]) -> Factors:
        options, weights = self.options, [part.weight for part, _ in self.own]
        merge = merge_of(options.method)
        if options.method == "linear":
            return stacked(list(zip(factors, weights, strict=True)))
        if options.method.startswith("knots"):
            return knots(factors, weights, merge, options.density, self._seed())
        merged = merge([part.product() for part in factors], weights, options.density, self._seed())
        shape = next((part.shape for part in factors if len(part.shape) > 2), factors[0].shape)
        return Factors(torch.eye(merged.shape[0], dtype=merged.dtype), merged, shape)

    def _factors(self, part: Part, update: ModuleUpdate) -> Factors:
        if update.magnitude is None:
            return factors_of(update)
        if self.weight_of is None:
            raise MismatchError(
                f"The adapter {part.name!r} is a DoRA: what it does to {self.name!r} depends on the base's weight, and "
                "of its base only the family is known; give the base with --base."
            )
        if self.options.rank is None:
            raise MismatchError(
                f"The adapter {part.name!r} is a DoRA: what it does to {self.name!r} depends on the base's weight and "
                "has no low rank, so no exact blend of it can be written. Give --rank to take the nearest change of "
                "that rank; the energy kept is reported."
            )
        weight = self.weight_of(self.name).double()
        return factors_of(ModuleUpdate("diff", {"diff": update.change(weight)}), shape=tuple(weight.shape))

    def _is_vector(self) -> bool:
        return any(update.kind == "diff" and update.factors["diff"].dim() < 2 for _, update in self.own)

    def _sum_of_vectors(self) -> ModuleUpdate:
        """Return the plain sum: there is nothing to trim or to decompose in the scale of a norm."""
        values = [part.weight * update.delta() for part, update in self.own]
        if len({value.shape for value in values}) > 1:
            raise MismatchError(f"The adapters change {self.name!r} by values of different shapes.")
        return ModuleUpdate("diff", {"diff": torch.stack(values).sum(dim=0).float()})

    def _seed(self) -> int:
        """Return a seed of the module's own, so that what is dropped does not depend on the other modules."""
        digest = hashlib.sha256(f"{self.options.seed}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def _truncated(factors: Factors, rank: int) -> tuple[ModuleUpdate, ModuleEnergy]:
    nearest, energy = truncated(factors, rank)
    return nearest.update(), energy


def _scaled(update: ModuleUpdate, weight: float) -> ModuleUpdate:
    """Return an update times a weight, of the same kind."""
    if weight == 1:
        return update
    name = next(name for name in _SCALED if name in update.factors)
    scaled = (update.factors[name].double() * weight).float()
    return replace(update, factors={**update.factors, name: scaled})


def _extra(parts: Sequence[Part]) -> Mapping[str, "Tensor"]:
    """Return the tensors that belong to no weight of a module, where the parts agree on them."""
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for part in parts for key in part.updates.extra):
        holders = [part for part in parts if key in part.updates.extra]
        found[key] = holders[0].updates.extra[key]
        alike = all(torch.equal(part.updates.extra[key], found[key]) for part in holders)
        # Vectors of new words change no weight of the base, so it does not matter who brings them.
        if not alike or (len(holders) < len(parts) and not key.startswith(_NEW_WORDS)):
            raise MismatchError(
                f"The adapter {holders[0].name!r} holds {key[:80]!r} whole, and not all of the others hold the same: "
                "what replaces a part of the base, such as a head or trained tokens, cannot be blended."
            )
    if whole := [key for key in found if not key.startswith(_NEW_WORDS)]:
        weights = sum(part.weight for part in parts)
        if not math.isclose(weights, 1.0):
            raise MismatchError(
                f"The adapters replace {whole[0][:80]!r} whole, which has no strength; give weights that add up to 1."
            )
    return found
