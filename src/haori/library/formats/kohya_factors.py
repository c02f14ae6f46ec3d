"""What kohya and LyCORIS call the tensors of a module behind its name, which other trainers share."""

from typing import TYPE_CHECKING

from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library.updates import ModuleUpdate

__all__ = ["kohya_tensors"]


def kohya_tensors(update: "ModuleUpdate") -> "dict[str, Tensor]":
    """Return the tensors of one update as kohya and LyCORIS name them behind the module's name.

    The alpha is always there, in float32, and takes in what rsLoRA makes of the scale: these formats know alpha / rank
    alone. Matrices of LoRA stand for 1 x 1 convolutions too.
    """
    import torch

    shape = weight_shape(update) or ()
    found: dict[str, Tensor] = {}
    if update.kind == "lora":
        ends = {"A": "lora_down.weight", "B": "lora_up.weight", "mid": "lora_mid.weight"}
        found = {ends[name]: factor for name, factor in update.factors.items()}
    elif update.kind == "diff":
        found = {"w_norm" if len(shape) == 1 else "diff": factor for factor in update.factors.values()}
    else:
        prefix = "hada" if update.kind == "loha" else "lokr"
        found = {f"{prefix}_{name}": factor for name, factor in update.factors.items()}
    if update.kind != "diff":
        found["alpha"] = torch.tensor(update.scale * update.rank if update.rank else update.alpha or 1.0)
    if update.magnitude is not None:
        magnitude = update.magnitude
        found["dora_scale"] = magnitude.reshape(-1, *[1] * (len(shape) - 1)) if magnitude.dim() == 1 else magnitude
    if update.bias is not None:
        found["b_norm" if len(shape) == 1 else "diff_b"] = update.bias
    return {end: tensor.contiguous() for end, tensor in found.items()}
