"""Quantises the linear layers of a model while it is loaded, through bitsandbytes."""

import logging
from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.core.errors import BaseError
from haori.core.quantization import Quantization, require_bitsandbytes

if TYPE_CHECKING:
    import torch

__all__ = ["bitsandbytes_options", "compute_alike"]


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


def compute_alike(model: "torch.nn.Module") -> None:
    """Keep 4-bit layers on the one kernel that training uses.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first forward in evaluation mode for a kernel
    without a backward: scales are rounded to bf16, and training afterwards gets no gradient through these layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
