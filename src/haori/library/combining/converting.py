"""An adapter of any kinds as LoRA, for formats and programs that know nothing else, with the energy that is kept.

Where the rank suffices nothing is lost: LoHa of rank r is a LoRA of rank r^2, LoKr one of the product of its parts'
ranks, and Tucker's core goes into A at the same rank.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError
from haori.library.combining.energy import Energy, ModuleEnergy
from haori.library.combining.factors import factors_of, truncated
from haori.library.update_shapes import weight_shape
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Converted", "as_lora"]


class Converted(NamedTuple):
    """The adapter as LoRA, and the energy kept of every module that was one of another kind or of a higher rank."""

    updates: AdapterUpdates
    energy: Energy


def as_lora(
    updates: AdapterUpdates,
    rank: int,
    weight_of: "Callable[[str], Tensor] | None" = None,
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Converted:
    """Convert an adapter to LoRA of at most this rank, module by module to the nearest.

    LoRA of that rank or less stays as it is, to the bit. So do updates of weights of one dimension, as norms have, and
    of biases: no factors express them, and a format that cannot hold them refuses them by name.

    Args:
        updates: The adapter.
        rank: At least 1.
        weight_of: Gives the base's weight of a module, on which the change by DoRA depends; needed for DoRA alone.
        advance: Is called with 1 after each module.

    Raises:
        InputError: The rank is below 1, or a module is of DoRA and `weight_of` is not given.
    """
    if rank < 1:
        raise InputError(f"A LoRA has a rank of at least 1, not {rank}.")
    modules: dict[str, ModuleUpdate] = {}
    energies: dict[str, ModuleEnergy] = {}
    for name, update in updates.modules.items():
        if _stays(update, rank):
            modules[name] = update
        else:
            whole = _without_magnitude(name, update, weight_of)
            shape = weight_shape(whole)
            nearest, energies[name] = truncated(factors_of(whole, shape=shape), rank)
            modules[name] = replace(nearest.update(), bias=update.bias)
        advance(1)
    return Converted(replace(updates, modules=modules), Energy(energies))


def _stays(update: ModuleUpdate, rank: int) -> bool:
    if len(weight_shape(update) or ()) < 2:
        return True
    plain = update.kind == "lora" and "mid" not in update.factors and update.magnitude is None
    return plain and int(update.rank or 0) <= rank


def _without_magnitude(name: str, update: ModuleUpdate, weight_of: "Callable[[str], Tensor] | None") -> ModuleUpdate:
    if update.magnitude is None:
        return update
    if weight_of is None:
        raise InputError(
            f"{name} is of DoRA, whose change depends on the weights of the base: name the base that it was made for, "
            "or choose a format that holds DoRA, such as kohya."
        )
    return ModuleUpdate("diff", {"diff": update.change(weight_of(name).double())})
