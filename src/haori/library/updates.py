"""The neutral form of an adapter: what it adds to each weight, whatever file it came from.

Every format reads into this form and is written from it; blending, resizing and merging work on it. A module is named
by its component and its path in the base, as diffusers and transformers spell it: `unet.mid_block.resnets.0.conv1`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`, `transformer.transformer_blocks.0.attn.to_q`, and for a base of one
model `model.` before the path, as in `model.model.layers.0.self_attn.q_proj`.

Sources: LoRA (Hu et al. 2021, eq. 3), LoHa (Hyeon-Woo et al. 2021, FedPara, prop. 1 and 2), LoKr (Yeh et al. 2023,
LyCORIS, eq. 8), Tucker decomposition of convolutions (FedPara, prop. 3), DoRA (Liu et al. 2024, eq. 5).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from haori.core.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["FACTORS", "AdapterUpdates", "Kind", "ModuleUpdate", "is_by_input", "kron"]

Kind = Literal["lora", "loha", "lokr", "diff"]

FACTORS: Mapping[Kind, frozenset[str]] = {
    "lora": frozenset({"A", "B", "mid"}),
    "loha": frozenset({"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}),
    "lokr": frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}),
    "diff": frozenset({"diff"}),
}
"""The names that the factors of each kind may have."""


@dataclass(frozen=True)
class ModuleUpdate:
    """What an adapter adds to the weight W of one module, and to its bias.

    The factors of each kind, with r the rank, `k` the kernel of a convolution, and what they make:

    | kind | factors | dW |
    |---|---|---|
    | lora | A [r, in(, k...)], B [out, r(, 1...)] | scale · B A |
    | lora | the same with 1 x 1 kernels, and mid [r, r, k...] | scale · sum_ij mid[i, j] B[:, i] A[j, :] |
    | loha | w1_a, w2_a [out, r], w1_b, w2_b [r, in · k...] | scale · (w1_a w1_b) * (w2_a w2_b) |
    | loha | w1_a, w2_a [r, out], w1_b, w2_b [r, in], t1, t2 [r, r, k...] | the same of two Tucker products |
    | lokr | w1 or w1_a w1_b; w2 or w2_a w2_b, or Tucker with t2 | scale · kron(w1, w2) |
    | diff | diff, shaped as W; none if only the bias changes | diff |

    Attributes:
        kind: How the factors give dW.
        factors: The tensors as stored, in their own dtype.
        alpha: The scale is alpha / rank; None means 1.
        rslora: The scale is alpha / sqrt(rank).
        magnitude: DoRA's m, [out(, 1...)] or [1, in(, 1...)] if the norm is taken over the columns of W.
        bias: What is added to the bias, [out].
        shape: Shape of W where the factors do not tell it: a convolution under LoHa or LoKr without Tucker.
    """

    kind: Kind
    factors: Mapping[str, "Tensor"]
    alpha: float | None = None
    rslora: bool = False
    magnitude: "Tensor | None" = None
    bias: "Tensor | None" = None
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def rank(self) -> int | None:
        """Return the rank, or None for a kind or a shape of it without one."""
        found = self.factors
        if self.kind == "lora":
            return int(found["A"].shape[0])
        for name in ("w1_b", "w2_b"):  # of LyCORIS's shapes, both [r, ...]
            if self.kind in {"loha", "lokr"} and name in found:
                return int(found[name].shape[0])
        return None

    @property
    def scale(self) -> float:
        """Return what the product of the factors is multiplied by; 1 where nothing is factored (LyCORIS does so)."""
        rank = self.rank
        if self.alpha is None or rank is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def delta(self, dtype: "dtype | None" = None) -> "Tensor":
        """Return dW before any magnitude, in `dtype` (float64 by default).

        Its shape is that of W as far as the file tells it: a convolution's under LoHa or LoKr without Tucker is
        [out, in · k...] unless `shape` is known.
        """
        import torch

        kind = dtype or torch.float64
        factors: dict[str, Tensor] = {name: factor.to(kind) for name, factor in self.factors.items()}
        if self.kind == "diff":
            return factors["diff"] if factors else torch.zeros(self.shape or (), dtype=kind)
        product: Tensor = _PRODUCTS[self.kind](factors)
        if self.shape is not None:
            product = product.reshape(self.shape)
        return product * self.scale

    def change(self, weight: "Tensor") -> "Tensor":
        """Return by how much the adapter changes `weight` at strength 1, in the weight's dtype.

        Without a magnitude that is dW; with one it is m · (W + dW) / |W + dW| - W, the norm taken over each output row
        of W + dW, or over each column of inputs where m is shaped for those.

        Args:
            weight: W, of any float dtype; a change at strength s is s times what is returned.

        Raises:
            FileFormatError: W has another number of values than dW.
        """
        import torch

        if not self.factors:
            return weight.new_zeros(weight.shape)
        delta = self.delta(weight.dtype)
        if delta.numel() != weight.numel():
            raise FileFormatError(
                f"The update is of shape {tuple(delta.shape)} and the weight of {tuple(weight.shape)}: they do not fit."
            )
        delta = delta.reshape(weight.shape)
        if self.magnitude is None:
            return delta
        changed = weight + delta
        magnitude = self.magnitude.to(weight.dtype)
        by_input = is_by_input(magnitude, weight)
        rest = [axis for axis in range(weight.dim()) if axis != (1 if by_input else 0)]
        norm: Tensor = torch.linalg.vector_norm(changed, dim=rest, keepdim=True)
        return changed * (magnitude.reshape(norm.shape) / norm) - weight


@dataclass(frozen=True)
class AdapterUpdates:
    """A whole adapter: its updates by module, and what its file said beside them.

    Attributes:
        modules: Updates by module name, such as `unet.mid_block.attentions.0.proj_in`.
        metadata: The file's header metadata, as it was.
        format: Name of the format it was read from.
        family: Kind of base by the shapes: `sd15`, `sdxl`, `flux1`, ...; None if it is not told.
        extra: Tensors that belong to no module's weight and are kept as they are: the whole modules of a classifier's
            head, textual-inversion vectors (`bundle_emb`), by name.
    """

    modules: Mapping[str, ModuleUpdate]
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = ""
    family: str | None = None
    extra: Mapping[str, "Tensor"] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components of the base that it changes."""
        return tuple(sorted({name.partition(".")[0] for name in self.modules}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the ranks that occur, in order."""
        return tuple(sorted({rank for update in self.modules.values() if (rank := update.rank) is not None}))


def _lora(factors: "Mapping[str, Tensor]") -> "Tensor":
    a, b, mid = factors["A"], factors["B"], factors.get("mid")
    if mid is not None:
        return _tucker(mid, b.flatten(1).T, a.flatten(1))
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


def _loha(factors: "Mapping[str, Tensor]") -> "Tensor":
    halves = []
    for which in ("1", "2"):
        a, b, core = factors[f"w{which}_a"], factors[f"w{which}_b"], factors.get(f"t{which}")
        halves.append(a @ b if core is None else _tucker(core, a, b))
    return halves[0] * halves[1]


def _lokr(factors: "Mapping[str, Tensor]") -> "Tensor":

    w1 = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    if "w2" in factors:
        w2 = factors["w2"]
    elif "t2" in factors:
        w2 = _tucker(factors["t2"], factors["w2_a"], factors["w2_b"])
    else:
        w2 = factors["w2_a"] @ factors["w2_b"]
    return kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim())), w2)


def kron(first: "Tensor", second: "Tensor") -> "Tensor":
    """Return the Kronecker product, of tensors of any strides: `torch.kron` fails on some with an axis of size 1."""
    import torch

    plain = torch.contiguous_format
    return torch.kron(first.clone(memory_format=plain), second.clone(memory_format=plain))


def _tucker(core: "Tensor", a: "Tensor", b: "Tensor") -> "Tensor":
    """Return sum_ij core[i, j] a[i, :] b[j, :], with core [r, r, k...], a [r, out], b [r, in]: [out, in, k...]."""
    import torch

    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def is_by_input(magnitude: "Tensor", weight: "Tensor") -> bool:
    """Say whether m holds a value per input ([1, in, ...]) rather than per output ([out] or [out, 1, ...]).

    PEFT keeps that of a convolution as [1, out, 1, 1]; its reader gives it the shape [out].
    """
    shape = tuple(magnitude.shape)
    outputs, inputs = weight.shape[0], weight.shape[1]
    if magnitude.numel() not in {outputs, inputs}:
        raise FileFormatError(f"The magnitude is of shape {shape}, and the weight of {tuple(weight.shape)}.")
    return len(shape) > 1 and shape[0] == 1 and shape[1] == inputs and (inputs != 1 or outputs == 1)


_PRODUCTS: "Mapping[Kind, Callable[[Mapping[str, Tensor]], Tensor]]" = {"lora": _lora, "loha": _loha, "lokr": _lokr}
