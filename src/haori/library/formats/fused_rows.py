"""Splits the update of a fused module by the rows of its weight, and puts updates one below the other, both exactly.

With s the scale, rows of dW = s B A are rows of B with the whole of A (LoHa: rows of w1_a and w2_a; LoKr: rows of w1).
The other way round, updates that share A stack their B; those that do not become block-diagonal, and ranks add up:

    [s1 B1 A1]   [s1 B1     0] [A1]
    [s2 B2 A2] = [    0 s2 B2] [A2]
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import InputError
from haori.library.formats.without_lokr import without_lokr
from haori.library.update_shapes import weight_shape
from haori.library.updates import Kind, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Part", "split_rows", "stack_rows", "swap_halves"]

Span = tuple[int, int]

# The factors that hold the rows of W along their first axis; the others are shared by all rows.
_ROW_FACTORS: Mapping[Kind, tuple[str, ...]] = {
    "lora": ("B",),
    "loha": ("w1_a", "w2_a"),
    "lokr": ("w1", "w1_a"),
    "diff": ("diff",),
}


class Part(NamedTuple):
    """One of the modules that are put one below the other: its rows, and its update if it has one."""

    rows: int
    update: ModuleUpdate | None


def split_rows(update: ModuleUpdate, sizes: Sequence[int]) -> list[ModuleUpdate | None]:
    """Return the updates of modules whose weights lie one below the other in a fused one.

    Each keeps the whole of A. Where no rank serves two of them, as in a file that was itself put together from separate
    modules, each keeps its own ranks alone; and where some change something, those whose rows are zero have none.

    Args:
        update: Of the fused module, which is linear.
        sizes: Rows of each module, in order; they add up to those of the fused one.

    Raises:
        InputError: A DoRA magnitude by input, whose norm runs over all the fused rows.
    """
    spans = list(pairwise(accumulate(sizes, initial=0)))
    parts = [_rows(update, [span]) for span in spans]
    changing = [_changes(part) for part in parts]
    if update.kind == "lora":
        parts = _with_own_ranks(parts)
    return [part if changes or not any(changing) else None for part, changes in zip(parts, changing, strict=True)]


def swap_halves(update: ModuleUpdate) -> ModuleUpdate:
    """Return the update with the first half of the rows of W below the second.

    Raises:
        InputError: W has an odd number of rows.
    """
    rows = _row_count(update)
    if rows % 2:
        raise InputError(f"its {rows} rows cannot be halved.")
    return _rows(update, [(rows // 2, rows), (0, rows // 2)])


def stack_rows(parts: Sequence[Part]) -> ModuleUpdate:
    """Return the update of the fused module in which these lie one below the other; a part without one stays zero.

    Raises:
        InputError: No update of one kind expresses it; why is said as the end of a sentence.
    """
    _check_shapes(parts)
    given = [part.update for part in parts if part.update is not None]
    if any(update.magnitude is not None for update in given):
        _check_magnitudes(parts)
    if len({update.kind for update in given if update.factors}) > 1:
        parts = _all_without_lokr(parts)
        given = [part.update for part in parts if part.update is not None]
    weights = [part if part.update is None or part.update.factors else part._replace(update=None) for part in parts]
    if any(part.update is not None for part in weights):
        stacked = _shared(weights) or _side_by_side(weights)
    else:
        stacked = ModuleUpdate("diff", {})
    return replace(stacked, magnitude=_stacked_magnitudes(parts), bias=_stacked_biases(parts))


def _row_count(update: ModuleUpdate) -> int:
    shape = weight_shape(update)
    if shape is None:
        assert update.bias is not None
        return int(update.bias.shape[0])
    return shape[0]


def _rows(update: ModuleUpdate, spans: Sequence[Span]) -> ModuleUpdate:
    """Return the update of the rows in `spans`, in that order."""
    if update.kind == "lokr" and not _are_rows_of_w1(update, spans):
        update = without_lokr(update)
    factors = {
        name: _cut(factor, _scaled_down(update, spans)) if name in _ROW_FACTORS[update.kind] else factor
        for name, factor in update.factors.items()
    }
    magnitude = update.magnitude
    if magnitude is not None:
        if _is_by_input(update):
            raise InputError(
                "its DoRA magnitude is one of input columns, over all rows of the fused module at once, and cannot be "
                "divided; merge it into its base with the tool that made it, and extract a LoRA from the difference."
            )
        if magnitude.shape[:1] != (_row_count(update),):
            raise InputError(f"its magnitude of shape {list(magnitude.shape)} is not one of {_row_count(update)} rows.")
        magnitude = _cut(magnitude, spans)
    bias = None if update.bias is None else _cut(update.bias, spans)
    if bias is not None and update.bias is not None and not bias.any() and update.bias.any():
        bias = None  # of a module without one that was put together with others
    return replace(update, factors=factors, magnitude=magnitude, bias=bias, shape=None)


def _changes(update: ModuleUpdate) -> bool:
    rows = [update.factors[name] for name in _ROW_FACTORS[update.kind] if name in update.factors]
    has_bias = update.bias is not None and bool(update.bias.any())
    return update.magnitude is not None or has_bias or (bool(rows) and all(_is_any(factor) for factor in rows))


def _is_any(factor: "Tensor") -> bool:
    return bool(factor[:1].any()) or bool(factor.any())


def _cut(tensor: "Tensor", spans: Sequence[Span]) -> "Tensor":
    import torch

    pieces = [tensor[start:end] for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _is_by_input(update: ModuleUpdate) -> bool:
    shape, magnitude = weight_shape(update), update.magnitude
    if magnitude is None or shape is None:
        return False
    return magnitude.dim() > 1 and magnitude.shape[0] == 1 and magnitude.numel() == shape[1] and shape[0] != 1


def _used_ranks(tall: "Sequence[Tensor]") -> "Tensor":
    """Return which ranks some rows of each B [out, R] use: [parts, R]."""
    import torch

    return torch.stack([rows.ne(0).any(dim=0) for rows in tall])


def _with_own_ranks(parts: list[ModuleUpdate]) -> list[ModuleUpdate]:
    """Leave out of each part the ranks that its rows of B do not use, if no rank is used by two of them."""
    import torch

    tall = [part.factors["B"].flatten(1) for part in parts]
    if "mid" in parts[0].factors or _used_ranks([rows[:1] for rows in tall]).sum(dim=0).max() > 1:
        return parts  # so it is with what was trained fused, which the first rows tell
    used = _used_ranks(tall)
    if used.sum(dim=0).max() > 1 or used.any(dim=1).sum() < 2:
        return parts
    own = []
    for part, mask in zip(parts, used, strict=True):
        keep = mask.nonzero().flatten() if mask.any() else torch.tensor([0])
        factors = {"A": part.factors["A"][keep], "B": part.factors["B"][:, keep]}
        alpha = None if part.scale == 1 else part.scale * len(keep)
        own.append(replace(part, factors=factors, alpha=alpha, rslora=False))
    return own


def _w2_rows(update: ModuleUpdate) -> int:
    factors = update.factors
    if "w2" in factors:
        return int(factors["w2"].shape[0])
    return int(factors["w2_a"].shape[1 if "t2" in factors else 0])


def _are_rows_of_w1(update: ModuleUpdate, spans: Sequence[Span]) -> bool:
    step = _w2_rows(update)
    return all(start % step == 0 and end % step == 0 for start, end in spans)


def _scaled_down(update: ModuleUpdate, spans: Sequence[Span]) -> Sequence[Span]:
    if update.kind != "lokr":
        return spans
    step = _w2_rows(update)
    return [(start // step, end // step) for start, end in spans]


def _all_without_lokr(parts: Sequence[Part]) -> list[Part]:
    return [part if part.update is None else Part(part.rows, without_lokr(part.update)) for part in parts]


def _check_shapes(parts: Sequence[Part]) -> None:
    inputs: set[int] = set()
    for rows, update in parts:
        if update is None:
            continue
        shape = weight_shape(update)
        if (shape is not None and (len(shape) != 2 or shape[0] != rows)) or _row_count(update) != rows:
            raise InputError(f"one of the modules that are one there has the shape {shape}, not {rows} rows.")
        if update.kind != "diff" and any(factor.dim() != 2 for factor in update.factors.values()):
            raise InputError("one of the modules that are one there has the update of a convolution.")
        inputs |= set(shape[1:]) if shape else set()
    if len(inputs) > 1:
        raise InputError(f"the modules that are one there have {' and '.join(map(str, sorted(inputs)))} inputs.")


def _check_magnitudes(parts: Sequence[Part]) -> None:
    if any(part.update is None or part.update.magnitude is None for part in parts):
        raise InputError(
            "only some of the modules that are one there have a DoRA magnitude, and the others would need those of the "
            "base's weights."
        )
    if any(part.update is not None and _is_by_input(part.update) for part in parts):
        raise InputError("the DoRA magnitudes are of input columns, and those of the fused module cannot be told.")


def _shared(parts: Sequence[Part]) -> ModuleUpdate | None:
    """Stack updates that have all but their rows in common; None if they do not."""
    import torch

    given = [part.update for part in parts if part.update is not None]
    first = given[0]
    rows = _ROW_FACTORS[first.kind]
    for other in given[1:]:
        if other.factors.keys() != first.factors.keys() or other.scale != first.scale:
            return None
        for name, factor in first.factors.items():
            its = other.factors[name]
            if name not in rows and not (factor.dtype == its.dtype and torch.equal(factor, its)):
                return None
    step = _w2_rows(first) if first.kind == "lokr" else 1
    if any(part.rows % step for part in parts):
        return None
    factors = dict(first.factors)
    for name in set(rows) & set(factors):
        like = first.factors[name]
        factors[name] = torch.cat(
            [
                like.new_zeros(part.rows // step, *like.shape[1:]) if part.update is None else part.update.factors[name]
                for part in parts
            ]
        )
    return replace(first, factors=factors)


def _side_by_side(parts: Sequence[Part]) -> ModuleUpdate:
    """Stack updates that have nothing in common: their ranks stand side by side."""
    import torch

    given = [part.update for part in parts if part.update is not None]
    if given[0].kind == "lokr":
        parts = _all_without_lokr(parts)
        if len({part.update.kind for part in parts if part.update is not None}) == 1:
            return _shared(parts) or _side_by_side(parts)
    pairs = {"lora": (("B", "A"),), "loha": (("w1_a", "w1_b"), ("w2_a", "w2_b"))}.get(given[0].kind, ())
    kinds = {update.kind for update in given}
    wanted = {name for pair in pairs for name in pair}
    if len(kinds) > 1 or not pairs or any(set(update.factors) != wanted for update in given):
        raise InputError(
            f"the modules that are one there have updates of the kinds {', '.join(sorted(kinds))}, which do not make "
            "up one; convert them to LoRA first."
        )
    scales = {update.scale for update in given}
    factors: dict[str, Tensor] = {}
    for place, (tall, wide) in enumerate(pairs):
        columns = []
        for part in parts:
            if part.update is None:
                columns.append(given[0].factors[tall].new_zeros(part.rows, 0))
                continue
            column, scale = part.update.factors[tall], part.update.scale
            columns.append(column if len(scales) == 1 or place else column.float() * scale)
        widest = functools.reduce(torch.promote_types, (column.dtype for column in columns))
        factors[tall] = torch.block_diag(*(column.to(widest) for column in columns))  # type: ignore[no-untyped-call]
        factors[wide] = torch.cat([update.factors[wide] for update in given])
    rank = int(factors[pairs[0][1]].shape[0])
    scale = scales.pop() if len(scales) == 1 else 1.0
    return ModuleUpdate(given[0].kind, factors, alpha=None if scale == 1 else scale * rank)


def _stacked_magnitudes(parts: Sequence[Part]) -> "Tensor | None":
    import torch

    found = [part.update.magnitude.flatten() for part in parts if part.update and part.update.magnitude is not None]
    return torch.cat(found) if found else None


def _stacked_biases(parts: Sequence[Part]) -> "Tensor | None":
    import torch

    biases = [None if part.update is None else part.update.bias for part in parts]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [like.new_zeros(part.rows) if bias is None else bias for part, bias in zip(parts, biases, strict=True)]
    )
