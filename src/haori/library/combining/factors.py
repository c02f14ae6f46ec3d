"""A change as the product of two thin matrices: exact factors of every kind of update, their sum, their truncation.

The singular values of B A need no matrix of the weight's size: with B = Q_b R_b and A^T = Q_a R_a (thin QR), they are
those of the small core R_b R_a^T. Everything is computed in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from haori.core.errors import MismatchError
from haori.library.combining.energy import ModuleEnergy
from haori.library.updates import ModuleUpdate, kron

__all__ = ["Factors", "factors_of", "low_rank", "numerical_rank", "stacked", "thin_factors", "truncated"]

# Singular values below this share of the largest are rounding of the fp32 in which factors are stored.
_ROUNDING = 1e-7
_SMALL = 512


class Factors(NamedTuple):
    """dW = B A, reshaped.

    Attributes:
        b: [out, R] in float64.
        a: [R, in · k...] in float64.
        shape: Shape of dW: [out, in] or [out, in, k...].
    """

    b: Tensor
    a: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Return R."""
        return int(self.a.shape[0])

    @property
    def full_rank(self) -> int:
        """Return the rank that a change of this shape can have at most."""
        return min(int(self.b.shape[0]), int(self.a.shape[1]))

    def product(self) -> Tensor:
        """Return dW, flat: [out, in · k...]."""
        return self.b @ self.a

    def update(self) -> ModuleUpdate:
        """Return it as a LoRA in fp32, at the scale 1."""
        kernel = self.shape[2:]
        a = self.a.reshape(self.rank, *self.shape[1:])
        b = self.b.reshape(*self.b.shape, *[1] * len(kernel))
        return ModuleUpdate("lora", {"A": a.float().contiguous(), "B": b.float().contiguous()}, alpha=float(self.rank))


def factors_of(update: ModuleUpdate, *, shape: tuple[int, ...] | None = None) -> Factors:
    """Return exact factors of an update without a magnitude, its scale included; A stays as it is stored.

    The product of a Hadamard product is that of rank r1 · r2 (each row of B the Kronecker product of the halves'
    rows), and kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2). What comes to full rank, or is given whole, is returned
    as an identity times the matrix.

    Args:
        update: The update of a weight of at least two axes.
        shape: Shape of the weight, if it is known; otherwise the update's own.
    """
    pair = thin_factors(update)
    if pair is None:
        delta = update.delta()
        whole = delta.flatten(1)
        shape = shape or tuple(delta.shape)
        tall = whole.shape[0] > whole.shape[1]
        eye = torch.eye(min(whole.shape), dtype=torch.float64)
        b, a = (whole, eye) if tall else (eye, whole)
    else:
        b, a = pair
        shape = shape or _shape(update, b, a)
    if b.shape[0] * a.shape[1] != math.prod(shape):
        raise MismatchError(
            f"An update of shape {[b.shape[0], a.shape[1]]} does not fit a weight of shape {list(shape)}."
        )
    return Factors(b, a, shape)


def thin_factors(update: ModuleUpdate, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
    """Return B [out, R] with the scale in it and A [R, in · k...], flat; None where R is no less than a side of dW.

    Args:
        update: The update of a weight; its magnitude is left out of account.
        dtype: What to compute and return them in.
    """
    pair = _pair(update, dtype)
    return None if pair is None or pair[1].shape[0] >= min(pair[0].shape[0], pair[1].shape[1]) else pair


def stacked(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Return the exact factors of a weighted sum: sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]."""
    shape = next((factors.shape for factors, _ in parts if len(factors.shape) > 2), parts[0][0].shape)
    for factors, _ in parts:
        if (factors.b.shape[0], factors.a.shape[1]) != (parts[0][0].b.shape[0], parts[0][0].a.shape[1]):
            raise MismatchError(f"Updates of shapes {list(parts[0][0].shape)} and {list(factors.shape)} do not add up.")
    b = torch.cat([factors.b * weight for factors, weight in parts], dim=1)
    return Factors(b, torch.cat([factors.a for factors, _ in parts]), shape)


def truncated(factors: Factors, rank: int) -> tuple[Factors, ModuleEnergy]:
    """Return the nearest factors of at most this rank, with the energy kept.

    Where `rank` is no less than that of the sum, the result is exact, with factors of its true rank.
    """
    if factors.rank >= factors.full_rank:
        b, a, energy = low_rank(factors.product(), rank)
        return Factors(b, a, factors.shape), energy
    q_b, r_b = torch.linalg.qr(factors.b)  # [out, R], [R, R]
    q_a, r_a = torch.linalg.qr(factors.a.T)  # [in, R], [R, R]
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = _kept(s, rank)
    root = s[:kept].sqrt()
    b, a = q_b @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ q_a.T
    return Factors(b, a, factors.shape), _energy(s.square(), kept)


def numerical_rank(factors: Factors) -> int:
    """Return how many singular values are more than rounding; at least 1."""
    if factors.rank >= factors.full_rank:
        return _kept(torch.linalg.svdvals(factors.product()), factors.full_rank)
    core = torch.linalg.qr(factors.b).R @ torch.linalg.qr(factors.a.T).R.T
    return _kept(torch.linalg.svdvals(core), factors.rank)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, ModuleEnergy]:
    """Return B [out, R] and A [R, in] of the nearest matrix of at most this rank, with the energy kept.

    A large matrix M is taken through the eigenvectors U of the smaller of M M^T and M^T M: U U^T M is the projection,
    whatever the precision of U, and in float64 it is the best one to some 1e-8 of the energy.

    Args:
        matrix: [out, in], in float64.
        rank: Most singular values to keep.
    """
    if min(matrix.shape) <= _SMALL:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        kept = _kept(s, rank)
        root = s[:kept].sqrt()
        return u[:, :kept] * root, root[:, None] * vh[:kept], _energy(s.square(), kept)
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares = values.flip(0).clamp(min=0)
    kept = _kept(squares.sqrt(), rank)
    u = vectors.flip(1)[:, :kept]  # [smaller side, R]
    root = squares[:kept].pow(0.25).clamp(min=torch.finfo(torch.float64).tiny)
    thin, rest = u * root, (u.T @ matrix if wide else u.T @ matrix.T) / root[:, None]
    energy = ModuleEnergy(float((rest * root[:, None]).square().sum()), float(matrix.square().sum()))
    return (thin, rest, energy) if wide else (rest.T, thin.T, energy)


def _kept(s: Tensor, rank: int) -> int:
    return max(1, min(rank, int((s > _ROUNDING * s[0]).sum())))


def _energy(squares: Tensor, kept: int) -> ModuleEnergy:
    return ModuleEnergy(float(squares[:kept].sum()), float(squares.sum()))


def _shape(update: ModuleUpdate, b: Tensor, a: Tensor) -> tuple[int, ...]:
    if update.shape is not None:
        return update.shape
    found = update.factors
    if update.kind == "lora":
        kernel = tuple(found["mid"].shape[2:]) if "mid" in found else tuple(found["A"].shape[2:])
        return (b.shape[0], a.shape[1] // math.prod(kernel), *kernel)
    core = found.get("t1", found.get("t2", found.get("w2")))
    kernel = tuple(core.shape[2:]) if core is not None else ()
    return (b.shape[0], a.shape[1] // math.prod(kernel), *kernel)


def _pair(update: ModuleUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return B and A [R, in · k...] with the scale in B, or None where the update is no product of thin matrices."""
    if update.kind == "diff":
        return None
    found = {name: factor.to(dtype) for name, factor in update.factors.items()}
    if update.kind == "lora":
        a = found["A"]
        if "mid" in found:
            a = torch.einsum("ij...,jq->iq...", found["mid"], a.flatten(1))
        b, a = found["B"].flatten(1), a.flatten(1)
    elif update.kind == "loha":
        (b1, a1), (b2, a2) = (_half(found, which) for which in ("1", "2"))
        b = torch.einsum("pi,pj->pij", b1, b2).flatten(1)
        a = torch.einsum("iq,jq->ijq", a1, a2).flatten(0, 1)
    else:
        b, a = _kronecker(found)
    return b * update.scale, a


def _half(found: dict[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
    """Return one factor of a Hadamard product as [out, r] and [r, in · k...]."""
    b, a, core = found[f"w{which}_a"], found[f"w{which}_b"], found.get(f"t{which}")
    if core is None:
        return b, a
    return b.T, torch.einsum("ij...,jq->iq...", core, a).flatten(1)


def _kronecker(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if "w1" in found:
        b1, a1 = _whole(found["w1"])
    else:
        b1, a1 = found["w1_a"], found["w1_b"]
    if "w2" in found:
        b2, a2 = _whole(found["w2"].flatten(1))
    elif "t2" in found:
        b2, a2 = found["w2_a"].T, torch.einsum("ij...,jq->iq...", found["t2"], found["w2_b"]).flatten(1)
    else:
        b2, a2 = found["w2_a"], found["w2_b"].flatten(1)
    # The kernel is the second factor's alone, so its positions stay innermost in the product.
    return kron(b1, b2), kron(a1, a2)


def _whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (matrix, eye) if rows > columns else (eye, matrix)
