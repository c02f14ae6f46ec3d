"""How much of its rank a trained adapter uses: the singular values of each module's update B A.

With B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of the small R x R matrix R_B R_A^T, so that
no update is ever formed. The energy of an update is the sum of its squared singular values.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

__all__ = ["Spectrum", "singular_values", "spectrum_of"]

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Spectrum(NamedTuple):
    """The updates of an adapter whose modules all have the same rank."""

    rank: int
    modules: int
    top_half: float
    """Mean over modules of the share of energy in the larger half of the singular values; 0.5 is flat."""


def spectrum_of(adapter: Path) -> Spectrum | None:
    """Return the spectrum of a saved adapter; None if it is no LoRA of one rank of at least 2, or changes nothing.

    Args:
        adapter: Folder with `adapter_model.safetensors`.
    """
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file) if file.is_file() else {}
    names = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    ranks = {tensors[name + _A].shape[0] for name in names}
    shares = []
    for name in names if len(ranks) == 1 and min(ranks) > 1 else []:
        energy = singular_values(tensors[name + _A], tensors[name + _B]).square()  # R, largest first
        if float(energy.sum()) > 0.0:
            shares.append(float(energy[: min(ranks) // 2].sum() / energy.sum()))
    if not shares:
        return None
    return Spectrum(min(ranks), len(shares), sum(shares) / len(shares))


def singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the singular values of B A, largest first.

    Args:
        a: R D_in (a convolution's kernel is flattened).
        b: D_out R.
    """
    factor_a = torch.linalg.qr(a.flatten(1).double().T, mode="r").R  # R R
    factor_b = torch.linalg.qr(b.flatten(1).double(), mode="r").R  # R R
    values: torch.Tensor = torch.linalg.svdvals(factor_b @ factor_a.T)
    return values
