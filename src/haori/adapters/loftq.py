"""LoftQ (Li et al. 2023, arXiv 2310.08659): A and B begin as what quantising the base lost.

    min over A0, B0 of ||W - Q(W) - s B0 A0||_F, by the r largest singular values of W - Q(W)

This is the first of the paper's alternating steps: the base stays Q(W), as it was quantised on loading. PEFT's function
for it (`replace_lora_weights_loftq`) needs a GPU and leaves out the scale s.

What was trained, Q(W) + s B A, is at the end written as an ordinary adapter of the base itself, of rank 2r, since
Q(W) + s B0 A0 stands for W:

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from haori.adapters.lora_starts import ResidualBehaviour
from haori.core.errors import BaseError
from haori.core.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["LoftqBehaviour", "start_from_error"]

_PREFIX = "base_model.model."


class LoftqBehaviour(ResidualBehaviour):
    """Doubles the rank at the end; the quantised base was never changed, so nothing is given back to it."""

    def give_back(self, layer: Any, taken: torch.Tensor) -> None:
        """Leave the quantised weight as it is."""


@torch.no_grad()
def start_from_error(model: "PeftModel") -> None:
    """Set A and B of every 4-bit layer to the best approximation, of their rank, of its quantisation error.

    The weights before quantisation are read from the base's files, one at a time.

    Raises:
        BaseError: A weight is not in the files under a name that belongs to its module.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit

    layers = {
        name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }
    for name, weight in _weights(model.get_base_model(), list(layers)):
        layer: Any = layers[name]
        quantised = layer.get_base_layer().weight
        lost = weight.to(quantised.device).float() - dequantize_4bit(quantised.data, quantised.quant_state).float()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank, scale = layer.r["default"], layer.scaling["default"]
        root = (s[:rank] / scale).sqrt()  # R
        layer.lora_A["default"].weight.copy_(root[:, None] * vh[:rank])  # R in
        layer.lora_B["default"].weight.copy_(u[:, :rank] * root)  # out R


def _stored(base: Any) -> tuple[str, Path]:
    """Return what the files may leave out of a module's name, and the folder of the files."""
    if hasattr(base, "denoiser"):  # a pipeline, whose components have a folder each
        return f"{base.family.denoiser}.", Path(base.denoiser.config["_name_or_path"])
    return f"{base.base_model_prefix}.", Path(base.name_or_path)


def _weights(base: Any, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the stored weight of each module; files may leave out the name of the model inside the head."""
    from safetensors import safe_open

    inner, folder = _stored(base)
    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            holders |= dict.fromkeys(read_safetensors_header(path).tensors, file)
        for name in names:
            key = next((k for k in (f"{name}.weight", f"{name}.weight".removeprefix(inner)) if k in holders), None)
            if key is None:
                raise BaseError(
                    f"The start 'loftq' needs the weight of {name!r} as it was before quantisation, and the base's "
                    "files store it in another form; leave method.init at 'default'."
                )
            yield name, holders[key].get_tensor(key)
