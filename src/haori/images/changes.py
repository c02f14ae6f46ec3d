"""What a blend of adapters does to one module: W' = W + sum_i m_i dW_i, written out, or as thin factors beside W.

dW_i is the whole change that adapter i makes at strength 1, whatever its kind. Of DoRA (Liu et al. 2024, eq. 5) it is

    dW = c (W + B A) - W,  c = magnitude / |W + B A|, a number for each output row,

so a blend of DoRA is the sum of the changes that each would make alone, and with g = 1 + sum_i m_i (c_i - 1)

    W' = g W + sum_i m_i c_i B_i A_i,

which needs the rows' numbers c_i once and no second copy of W. LoHa and LoKr whose product has a low rank are such
factors too (`library.combining.factors`). Where factors of a blend would take more work than a weight, and for
everything else, W' is written out. Beside W the factors take no memory to speak of; in 16 bits they are more exact,
since W' is rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from haori.core.errors import InputError
from haori.library.combining.factors import thin_factors
from haori.library.updates import ModuleUpdate, is_by_input

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Part",
    "ThinChange",
    "WholeChange",
    "is_pointwise",
    "is_quantised",
    "merged_parameters",
    "row_scale",
    "thin_change",
]


class Part(NamedTuple):
    """One adapter's update of a module, at the strength m of a blend.

    `row_scale` gives DoRA's c [out] in fp32, which is computed once and kept.
    """

    strength: float
    update: ModuleUpdate
    row_scale: Callable[[], Tensor]


@dataclass(frozen=True)
class ThinChange:
    """A change that is added to what the module computes: g y + B (A x) + bias.

    Attributes:
        a: A [R, in(, k...)].
        b: B [out, R], with strengths and scales in it.
        gain: g [out] of DoRA, by which the module's own output without bias is multiplied; None for 1.
        bias: What is added to the bias, [out]; None for nothing.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class WholeChange:
    """The parameters that take the place of a module's own."""

    parameters: "Mapping[str, nn.Parameter]"


def merged_parameters(module: nn.Module, parts: Sequence[Part]) -> dict[str, nn.Parameter]:
    """Return W + sum_i m_i dW_i and the bias, computed in fp32 and rounded once, as new parameters.

    Raises:
        InputError: The module's weight is quantised.
    """
    weight: Any = module.weight
    if is_quantised(module):
        raise InputError(
            "An adapter cannot be merged into the quantised weights of this base, nor a DoRA, LoHa, LoKr or norm used "
            "on them; load the base in bf16 or fp16."
        )
    found = {}
    if any(part.update.factors for part in parts):
        found["weight"] = nn.Parameter(_merged(weight.detach(), parts), requires_grad=False)
    biases = [part.strength * part.update.bias.float() for part in parts if part.update.bias is not None]
    if biases:
        bias: Any = module.bias
        total = bias.detach().to(_wide(bias.dtype)) + torch.stack(biases).sum(dim=0).to(bias.device)
        found["bias"] = nn.Parameter(total.to(bias.dtype), requires_grad=False)
    return found


def thin_change(module: nn.Module, parts: Sequence[Part]) -> ThinChange | None:
    """Return the change of a module by a blend as thin factors; None where W' written out takes less work."""
    if not isinstance(module, nn.Linear) and not (isinstance(module, _ConvNd) and module.groups == 1):
        return None
    weight: Any = module.weight
    quantised = is_quantised(module)
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(weight.shape)
    pairs = []
    gain: Tensor | None = None
    for strength, update, scale in parts:
        if not update.factors:
            continue
        pair = thin_factors(update, torch.float32)
        if pair is None or (update.magnitude is not None and (quantised or is_by_input(update.magnitude, weight))):
            return None
        b = pair[0] * strength
        if update.magnitude is not None:
            c = scale().cpu()
            b = b * c[:, None]
            gain = (torch.ones(shape[0]) if gain is None else gain) + strength * (c - 1)
        pairs.append((b, pair[1]))
    out, inner = shape[0], int(torch.Size(shape[1:]).numel())
    rank = sum(int(a.shape[0]) for _, a in pairs)
    if rank * (out + inner) > out * inner and not quantised:
        return None
    dtype, device = (torch.float32 if quantised else weight.dtype), weight.device
    a = torch.cat([a for _, a in pairs]) if pairs else torch.zeros(0, inner)
    b = torch.cat([b for b, _ in pairs], dim=1) if pairs else torch.zeros(out, 0)
    biases = [part.strength * part.update.bias.float() for part in parts if part.update.bias is not None]
    return ThinChange(
        a.reshape(rank, *shape[1:]).to(device, dtype),
        b.to(device, dtype).contiguous(),
        None if gain is None else gain.to(device, dtype),
        torch.stack(biases).sum(dim=0).to(device, dtype) if biases else None,
    )


def is_pointwise(module: nn.Module) -> bool:
    """Say whether a module is one matrix for each place: a linear layer, or a convolution of one pixel."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, _ConvNd)
        and module.groups == 1
        and set(module.kernel_size) == set(module.stride) == {1}
        and not any(module.padding)
    )


def row_scale(module: nn.Module, update: ModuleUpdate) -> Tensor:
    """Return DoRA's c [out] = magnitude / |W + dW|, in fp32."""
    weight: Any = module.weight
    wide = weight.detach().to(_wide(weight.dtype), copy=True)
    assert update.magnitude is not None
    magnitude = update.magnitude.to(device=wide.device, dtype=wide.dtype).flatten()
    pair = thin_factors(update, wide.dtype)
    flat = wide.flatten(1)
    if pair is None:
        flat = flat + update.delta(wide.dtype).reshape(flat.shape).to(wide.device)
    else:
        flat.addmm_(pair[0].to(wide.device), pair[1].to(wide.device))
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return magnitude / norm


def is_quantised(module: nn.Module) -> bool:
    """Say whether the weight of a module is kept in fewer bits than floating-point numbers have."""
    weight: Any = module.weight
    return not weight.is_floating_point()


def _merged(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    wide = weight.to(_wide(weight.dtype))
    tall, flat, whole = [], [], []
    for strength, update, _ in parts:
        if not update.factors:
            continue
        pair = thin_factors(update, wide.dtype) if update.magnitude is None else None
        if pair is None:
            whole.append(strength * _moved(update, wide.device).change(wide))
        else:
            tall.append(pair[0] * strength)
            flat.append(pair[1])
    if tall:
        b, a = torch.cat(tall, dim=1).to(wide.device), torch.cat(flat).to(wide.device)
        wide = torch.addmm(wide.flatten(1), b, a).reshape(weight.shape)
    for change in whole:
        wide = wide + change
    return wide.to(weight.dtype)


def _moved(update: ModuleUpdate, device: torch.device) -> ModuleUpdate:
    if device.type == "cpu":
        return update
    factors = {name: factor.to(device) for name, factor in update.factors.items()}
    magnitude = None if update.magnitude is None else update.magnitude.to(device)
    return ModuleUpdate(update.kind, factors, update.alpha, update.rslora, magnitude, update.bias, update.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
