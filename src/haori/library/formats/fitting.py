"""Checks that the factors of an update fit one another, without multiplying them."""

from haori.core.errors import FileFormatError
from haori.library.updates import ModuleUpdate

__all__ = ["check_fits"]


def check_fits(where: str, module: str, update: ModuleUpdate) -> None:
    """Refuse factors that cannot be multiplied, an empty one, and a magnitude or bias of another size than the output.

    Args:
        where: What errors call the adapter, at the beginning of a sentence.
        module: What they call the module.
        update: The update.

    Raises:
        FileFormatError: They do not fit; their shapes are named.
    """
    import torch

    shapes = ", ".join(f"{name} {list(factor.shape)}" for name, factor in sorted(update.factors.items()))
    problem = FileFormatError(f"{where} holds factors of {module!r} that do not fit one another: {shapes}.")
    if not all(factor.numel() for factor in update.factors.values()):
        raise problem
    pairs = [("w1_a", "w2_a"), ("w1_b", "w2_b"), ("t1", "t2")] if update.kind == "loha" else []
    found = update.factors
    if any(found[one].shape != found[two].shape for one, two in pairs if one in found or two in found):
        raise problem
    try:
        sizes = {name: torch.empty(factor.shape, device="meta") for name, factor in found.items()}
        shape = ModuleUpdate(update.kind, sizes, update.alpha, update.rslora).delta(torch.float32).shape
    except (RuntimeError, IndexError, ValueError, KeyError):
        raise problem from None
    for what, tensor in (("magnitude", update.magnitude), ("bias", update.bias)):
        allowed = set(shape[:2]) if what == "magnitude" or len(shape) == 2 else {shape[0]}
        if tensor is not None and tensor.numel() not in allowed:
            raise FileFormatError(
                f"{where} holds a {what} of {module!r} of shape {list(tensor.shape)}, which does not fit: {shapes}."
            )
