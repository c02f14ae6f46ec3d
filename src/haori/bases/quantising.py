"""Quantises the linear layers of a model through bitsandbytes: while transformers loads it, or layer by layer.

diffusers would quantise only where there is a GPU, so what it loads is quantised here.
"""

import logging
from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.core.errors import BaseError
from haori.core.quantization import Quantization, require_bitsandbytes

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["bitsandbytes_options", "compute_alike", "quantise_linears"]


def bitsandbytes_options(
    base: Base, wanted: Quantization, compute: "torch.dtype", whole: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the arguments of a BitsAndBytesConfig, of transformers or of diffusers.

    Args:
        base: The base, which must be in 16 or 32 bits.
        wanted: Bits.
        compute: Dtype of the products.
        whole: Modules that stay as they are.

    Raises:
        BaseError: The base is stored quantised.
        MissingExtraError: bitsandbytes is not installed.
    """
    if base.quantization is not None:
        raise BaseError(
            f"The base {base.name!r} is stored quantised ({base.quantization}) and cannot be quantised again."
        )
    require_bitsandbytes()
    # It warns of kernels that are not used here, and at every 8-bit product of the cast that the method consists of.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    skipped = {"llm_int8_skip_modules": list(whole) or None}
    if wanted.bits == 8:
        return {"load_in_8bit": True, **skipped}
    return {
        "load_in_4bit": True,
        **skipped,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": wanted.double,
        "bnb_4bit_compute_dtype": compute,
    }


def quantise_linears(base: Base, model: "nn.Module", wanted: Quantization, compute: "torch.dtype", device: str) -> None:
    """Replace the linear layers of a loaded model in memory by quantised ones on `device`; the rest is moved there.

    Modules that their class keeps in fp32 stay as they are.

    Raises:
        BaseError: The base is stored quantised.
        MissingExtraError: bitsandbytes is not installed.
    """
    from torch import nn

    bitsandbytes_options(base, wanted, compute)  # refuses what cannot be quantised
    whole = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in found:
        if not whole & set(name.split(".")):
            parent, _, leaf = name.rpartition(".")
            layer = _quantised(model.get_submodule(name), wanted, compute)
            setattr(model.get_submodule(parent), leaf, layer.to(device))
    model.to(device)
    compute_alike(model)


def _quantised(linear: Any, wanted: Quantization, compute: "torch.dtype") -> "nn.Module":
    """Return the layer that holds a linear layer's weights in fewer bits; they are quantised when it is moved."""
    import bitsandbytes

    quantised: Any = bitsandbytes.nn
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    layer: nn.Module
    if wanted.bits == 8:
        layer = quantised.Linear8bitLt(**sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = quantised.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": wanted.double}
        layer = quantised.Linear4bit(**sizes, bias=False, compute_dtype=compute, **kind)
        layer.weight = quantised.Params4bit(linear.weight.data, requires_grad=False, **kind)
    layer.bias = linear.bias
    return layer.requires_grad_(False)


def compute_alike(model: "torch.nn.Module") -> None:
    """Keep 4-bit layers on the one kernel that training uses.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first forward in evaluation mode for a kernel
    without a backward: scales are rounded to bf16, and training afterwards gets no gradient through these layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
